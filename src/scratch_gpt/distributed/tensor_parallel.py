"""Tensor parallelism: shard every matrix product of a model over the ranks of one machine.

Shoeybi et al., 2019, arXiv:1909.08053: matrices that read the residual stream are sharded by their outputs (attention
heads, MLP features); those that write to it are sharded by their inputs, and their partial products are summed. The
model's own `tp_plan` says which is which; torch's `parallelize_module` applies it. Embedding and head are sharded over
the vocabulary.
"""

import fnmatch
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from scratch_gpt.errors import UserError

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""Style of QK norms: replicated, but each rank applies them to its own heads only, so their gradients are summed."""
STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "rowwise": RowwiseParallel(),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
}


def check_divisible(config: Any, tp_size: int) -> None:
    """Raise a UserError if heads or MLP features are not divisible by ``tp_size``."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    indivisible = [f"{name} = {getattr(config, name)}" for name in names if getattr(config, name) % tp_size]
    if indivisible:
        raise UserError(
            f"tensor parallelism over {tp_size} processes divides heads and MLP evenly; here {', '.join(indivisible)}"
        )


def apply_tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Shard the weights of ``model``, which may have LoRA adapters, in place over the one-dimensional ``mesh``.

    Raises:
        UserError: Heads or MLP features are not divisible by the size of ``mesh``.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_divisible(model.config, mesh.size())
    parallelize_module(model, mesh, _plan(model), src_data_rank=None)
    if model.config.tie_word_embeddings and hasattr(model, "lm_head"):
        model.lm_head.weight = model.transformer.wte.weight


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Return the model's plan, extended to LoRA: the adapter matrix on the sharded side of a layer is sharded with it."""
    names = [name for name, _ in model.named_modules()]
    plan: dict[str, ParallelStyle] = {}
    for name, style in model.tp_plan.items():
        if style == PARTIAL_GRADIENT:
            continue
        if not fnmatch.filter(names, f"{name}.base_layer"):
            plan[name] = STYLES[style]
            continue
        plan[f"{name}.base_layer"] = STYLES[style]
        plan[f"{name}.{'lora_B' if style == 'colwise' else 'lora_A'}.*"] = STYLES[style]
    return plan


def parameters_with_partial_gradients(model: Any) -> list[nn.Parameter]:
    """Return the parameters whose gradients are to be summed over the mesh after the backward pass."""
    kinds = {name.rpartition(".")[2] for name, style in model.tp_plan.items() if style == PARTIAL_GRADIENT}
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in kinds]
    return [p for module in modules for p in module.parameters(recurse=False) if p.grad is not None]
