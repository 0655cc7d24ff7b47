"""Build a model's configuration from settings, or load a saved model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scratch_gpt.config import ModelSettings
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.presets import preset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_config(settings: ModelSettings, tokenizer: "PreTrainedTokenizerBase") -> ScratchGPTConfig:
    """Build the configuration from the preset, the fields given in the settings, and the tokenizer's vocabulary and ids.

    Raises:
        UserError: There is an unknown preset or field, or fields that contradict each other.
    """
    return build_config_without_tokenizer(
        settings,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_config_without_tokenizer(settings: ModelSettings, **tokenizer_fields: Any) -> ScratchGPTConfig:
    """Build the configuration as :func:`build_config` does, with the fields that a tokenizer would decide as keywords.

    Default: the values of the preset.
    """
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    name, overrides = given.pop("preset"), given.pop("overrides")
    known = {f.name for f in dataclasses.fields(ScratchGPTConfig)} | set(ScratchGPTConfig.attribute_map)
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UserError(f"--model.overrides: ScratchGPTConfig has no field {', '.join(unknown)}")
    try:
        return preset(name, **tokenizer_fields, **{**given, **overrides})
    except (ValueError, TypeError) as error:  # huggingface_hub's strict validation raises both
        raise UserError(f"--model: {error}") from error


def load_model(name_or_path: str) -> tuple[Any, Any]:
    """Load a saved causal language model in float32, and its tokenizer.

    Raises:
        UserError: There is no such model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:  # ValueError: a config.json is missing or of an unknown kind
        if Path(name_or_path).exists():
            raise UserError(f"{name_or_path} holds no complete model: {error}") from error
        raise UserError(f"there is no model {name_or_path}: give a folder that holds a config.json") from error
