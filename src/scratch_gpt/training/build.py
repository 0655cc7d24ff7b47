"""Models to train: freshly initialised from settings, or a saved one."""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from scratch_gpt.config import ModelSettings
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.presets import preset
from scratch_gpt.training.held import whole_shape
from scratch_gpt.training.layout import load_module, make_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_config(settings: ModelSettings, tokenizer: "PreTrainedTokenizerBase") -> ScratchGPTConfig:
    """The model's configuration: preset, then the fields given, then what the tokenizer decides.

    Raises:
        UserError: an unknown preset or field, or fields that contradict each other.
    """
    return configure(
        settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def configure(settings: ModelSettings, **of_tokenizer: Any) -> ScratchGPTConfig:
    """As :func:`build_config`, with the tokenizer's fields of ScratchGPTConfig by name; left out: the preset's own."""
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    name, overrides = given.pop("preset"), given.pop("overrides")
    known = {f.name for f in dataclasses.fields(ScratchGPTConfig)} | set(ScratchGPTConfig.attribute_map)
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UserError(f"--model.overrides: ScratchGPTConfig has no field {', '.join(unknown)}")
    try:
        return preset(name, **of_tokenizer, **{**given, **overrides})
    except (ValueError, TypeError) as error:  # huggingface_hub's strict validation raises both
        raise UserError(f"--model: {error}") from error


def build_model(config: ScratchGPTConfig, seed: int) -> ScratchGPTForCausalLM:
    """A new model in float32, the same for the same seed."""
    model = empty_model(config)
    make_room(model, torch.device("cpu"))
    initialise(model, seed)
    set_seed(seed)
    return model


def empty_model(config: ScratchGPTConfig) -> ScratchGPTForCausalLM:
    """A model that takes no memory yet, to be spread before it is filled."""
    with torch.device("meta"):
        return ScratchGPTForCausalLM(config)


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Draw the weights of ``model``, as it is spread: the same for the same seed however that is.

    The random numbers of each module follow from the seed and its name. No more than one is ever whole.
    """
    filled: set[int] = set()
    for name, module in model.named_modules():
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        if not own or all(id(parameter) in filled for parameter in own.values()):  # a tied head
            continue
        whole = copy.copy(module)
        whole._parameters = {
            **module._parameters,
            **{key: nn.Parameter(torch.empty(whole_shape(p))) for key, p in own.items()},
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
            model._init_weights(whole)
        load_module(module, whole._parameters)
        filled |= {id(parameter) for parameter in own.values()}


def load_model(name_or_path: str) -> tuple[Any, Any]:
    """A saved causal language model in float32 and its tokenizer.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:  # ValueError: a config.json is missing or of an unknown kind
        if Path(name_or_path).exists():
            raise UserError(f"{name_or_path} holds no complete model: {error}") from error
        raise UserError(f"there is no model {name_or_path}: give a folder that holds a config.json") from error
