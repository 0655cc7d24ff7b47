"""Activation checkpointing: forget what the blocks computed in the forward pass, and compute it again in the backward pass.

Chen et al., 2016, arXiv:1604.06174. "full" keeps only each block's input; "selective" keeps the results of the matrix
products and of attention, which are dear, and recomputes what lies between, and attention's scores, which are large
(Korthikanti et al., 2022, arXiv:2205.05198).
The random numbers of the second computation are those of the first, or dropout would give another gradient.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from scratch_gpt.config import TrainingSettings

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # float8
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def enable_activation_checkpointing(model: Any, settings: TrainingSettings) -> None:
    """Switch it on for every ``activation_checkpointing_every``-th block of ``model`` as the settings say."""
    if settings.activation_checkpointing == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if settings.activation_checkpointing == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(arguments, every_n_layers=settings.activation_checkpointing_every)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    if operation is torch.ops.aten.bmm.default:
        one, other = arguments  # queries and keys make scores, weights and values an output of the size of the queries
        kept = other.shape[2] <= one.shape[2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
