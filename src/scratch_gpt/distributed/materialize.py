"""Give a model on the meta device memory and initial weights."""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from scratch_gpt.distributed.dtensor import full_shape, shard_like, to_local
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTRotaryEmbedding


def materialize(model: Any, device: torch.device) -> None:
    """Give the empty ``model`` memory on ``device``, not filled but for what follows from the config."""
    model.to_empty(device=device)
    init_buffers(model, device)


def init_buffers(model: Any, device: torch.device) -> None:
    """What follows from the config in a model, or a part of one, that has memory."""
    if model.config.tie_word_embeddings and None not in (model.lm_head, model.transformer.wte):
        model.lm_head.weight = model.transformer.wte.weight
    if model.config.position_embedding_type == "rope":
        model.transformer.rotary_emb = ScratchGPTRotaryEmbedding(model.config).to(device)


def load_module_weights(module: nn.Module, whole: Mapping[str, torch.Tensor | None]) -> None:
    """Fill the parameters that ``module`` itself has, as they are spread, from whole ones."""
    for key, parameter in module.named_parameters(recurse=False):
        value = whole[key]
        assert value is not None
        to_local(parameter).copy_(to_local(shard_like(value.detach(), parameter)))


def build_model(config: ScratchGPTConfig, seed: int) -> ScratchGPTForCausalLM:
    """A new model in float32, the same for the same seed."""
    model = empty_model(config)
    materialize(model, torch.device("cpu"))
    init_weights(model, seed)
    set_seed(seed)
    return model


def empty_model(config: ScratchGPTConfig) -> ScratchGPTForCausalLM:
    """A model that takes no memory yet, to be spread before it is filled."""
    with torch.device("meta"):
        return ScratchGPTForCausalLM(config)


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
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
            **{key: nn.Parameter(torch.empty(full_shape(p))) for key, p in own.items()},
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
            model._init_weights(whole)
        load_module_weights(module, whole._parameters)
        filled |= {id(parameter) for parameter in own.values()}
