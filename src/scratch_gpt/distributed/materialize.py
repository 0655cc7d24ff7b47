"""Allocate and initialize a model that was built on the meta device."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from scratch_gpt.distributed.dtensor import full_shape, shard_like, to_local
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTRotaryEmbedding


def build_model(config: ScratchGPTConfig, seed: int) -> ScratchGPTForCausalLM:
    """Build a float32 model on the CPU whose weights depend on ``config`` and ``seed`` only."""
    model = build_meta_model(config)
    materialize(model, torch.device("cpu"))
    init_weights(model, seed)
    set_seed(seed)
    return model


def build_meta_model(config: ScratchGPTConfig) -> ScratchGPTForCausalLM:
    """Build a model on the meta device, which takes no memory, to be sharded before it is initialized."""
    with torch.device("meta"):
        return ScratchGPTForCausalLM(config)


def materialize(model: Any, device: torch.device) -> None:
    """Allocate uninitialized parameters of the meta ``model`` on ``device``, and compute its buffers."""
    model.to_empty(device=device)
    init_buffers(model, device)


def init_buffers(model: Any, device: torch.device) -> None:
    """Restore what allocation loses and the config determines: tied weights and rotary frequencies.

    ``model`` may be a pipeline stage, which lacks the head or the embedding.
    """
    if model.config.tie_word_embeddings and None not in (model.lm_head, model.transformer.wte):
        model.lm_head.weight = model.transformer.wte.weight
    if model.config.position_embedding_type == "rope":
        model.transformer.rotary_emb = ScratchGPTRotaryEmbedding(model.config).to(device)


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Initialize the weights of ``model``: the same values for the same ``seed`` however it is sharded.

    The random numbers of each module are seeded with its name. Only one module at a time is held unsharded.
    """
    initialized: set[int] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(id(parameter) in initialized for parameter in own.values()):  # no parameters, or a tied head
            continue
        load_module_weights(module, _initial_weights(model, module, f"{seed} {name}"))
        initialized |= {id(parameter) for parameter in own.values()}


def _initial_weights(model: Any, module: nn.Module, seed: str) -> dict[str, nn.Parameter]:
    """Return full, initialized weights for the parameters that ``module`` itself owns."""
    own = dict(module.named_parameters(recurse=False))
    try:
        for key, parameter in own.items():
            setattr(module, key, nn.Parameter(torch.empty(full_shape(parameter))))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
            model._init_weights(module)  # the method of transformers' models that initializes one module
        return dict(module.named_parameters(recurse=False))
    finally:
        for key, parameter in own.items():
            setattr(module, key, parameter)


def load_module_weights(module: nn.Module, full: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's shards of ``full`` into the parameters that ``module`` itself owns."""
    for key, parameter in module.named_parameters(recurse=False):
        to_local(parameter).copy_(to_local(shard_like(full[key].detach(), parameter)))
