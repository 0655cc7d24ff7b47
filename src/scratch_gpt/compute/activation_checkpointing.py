"""Activation checkpointing: drop the activations of blocks in the forward pass, and recompute them in the backward pass.

Chen et al., 2016, arXiv:1604.06174. "full" keeps only the input of each block. "selective" keeps the results of matrix
products and attention, which are expensive, and recomputes the cheap operations between them, and attention scores, which
are large (Korthikanti et al., 2022, arXiv:2205.05198). Recomputation uses the random numbers of the forward pass, because
with other dropout masks the gradients would be wrong.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from scratch_gpt.config import TrainingSettings

_SAVED_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # float8
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def enable_activation_checkpointing(model: Any, settings: TrainingSettings) -> None:
    """Checkpoint every ``activation_checkpointing_every``-th block of ``model``, if ``settings`` say so."""
    if settings.activation_checkpointing == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if settings.activation_checkpointing == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, selective_policy)
    model.activation_checkpointing_enable(kwargs, every_n_layers=settings.activation_checkpointing_every)


def selective_policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of expensive operations; recompute all others."""
    is_saved = operation in _SAVED_OPERATIONS
    if operation is torch.ops.aten.bmm.default:
        # queries x keys gives large scores; scores x values gives an output of the size of the queries
        left, right = args
        is_saved = right.shape[2] <= left.shape[2]
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
