"""Tensor parallelism: every matrix product divided over the processes of one machine.

Shoeybi et al., 2019, arXiv:1909.08053: the matrices that read the residual stream lie in parts of their outputs (some
attention heads, some columns of the MLP), those that write to it in parts of their inputs, whose products are added up.
Which is which, the model's own plan says; torch's `parallelize_module` does it. Embedding and head are divided by tokens.
"""

import fnmatch
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from scratch_gpt.errors import UserError

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""In the plan: a norm of single heads. It is whole everywhere, but meets only the heads of its process."""
STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "rowwise": RowwiseParallel(),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
}


def check_sizes(config: Any, size: int) -> None:
    """Raises a UserError that names what cannot be divided by ``size``."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    odd = [f"{name} = {getattr(config, name)}" for name in names if getattr(config, name) % size]
    if odd:
        raise UserError(f"tensor parallelism over {size} processes divides heads and MLP evenly; here {', '.join(odd)}")


def apply_tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Divide the weights of ``model``, in place, over the one-dimensional ``mesh``; it may have LoRA's adapters around it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_sizes(model.config, mesh.size())
    parallelize_module(model, mesh, _plan(model), src_data_rank=None)
    if model.config.tie_word_embeddings and hasattr(model, "lm_head"):
        model.lm_head.weight = model.transformer.wte.weight


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Of two matrices that adapt a third, the one that has its outputs, or inputs, is divided as it is."""
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


def partial_gradients(model: Any) -> list[nn.Parameter]:
    """The parameters whose gradients, after the backward pass, are to be added up over the mesh."""
    kinds = {name.rpartition(".")[2] for name, style in model.tp_plan.items() if style == PARTIAL_GRADIENT}
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in kinds]
    return [p for module in modules for p in module.parameters(recurse=False) if p.grad is not None]
