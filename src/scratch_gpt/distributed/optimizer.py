"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

AdamW has decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101). Muon orthogonalizes the momentum of a
matrix before it is applied (Jordan et al., 2024, kellerjordan.github.io/posts/muon); its update is scaled to the size of
an AdamW update, so that both take the same learning rate and weight decay (Liu et al., 2025, arXiv:2502.16982).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from scratch_gpt.config import TrainingSettings
from scratch_gpt.distributed.dtensor import full_shape
from scratch_gpt.distributed.muon import Muon
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.errors import UserError

ADAM_EPSILON = 1e-8
STATE_KEYS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""The state that each class of optimizer keeps for a parameter."""


class Optimizers:
    """One or two torch optimizers over disjoint parameters, used as if they were one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients instead of filling them with zeros."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state as tensors named {parameter}.{state}, each sharded like its parameter."""
        return {
            f"{name}.{key}": value.detach()
            for optimizer in self.optimizers
            for name, parameter in _named_parameters(optimizer).items()
            for key, value in optimizer.state[parameter].items()
        }

    def load_state_tensors(self, saved: SafetensorsReader) -> None:
        """Load what :meth:`state_tensors` returned, by parameter name; each rank reads its shards only.

        Raises:
            UserError: The state is that of another class of optimizer, or of another model.
        """
        for optimizer in self.optimizers:
            optimizer_class = type(optimizer).__name__
            parameters = _named_parameters(optimizer)
            saved_names = names_with_state(saved, parameters, optimizer_class)
            states = {
                index: {key: saved.read(f"{name}.{key}", parameter) for key in sorted(STATE_KEYS[optimizer_class])}
                for index, (name, parameter) in enumerate(parameters.items())
                if name in saved_names
            }
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def names_with_state(saved: SafetensorsReader, names: Iterable[str], optimizer_class: str) -> list[str]:
    """Return those of the parameter ``names`` for which ``saved`` has optimizer state.

    Raises:
        UserError: It is the state of another class of optimizer than ``optimizer_class``.
    """
    saved_keys: dict[str, set[str]] = {}
    for tensor_name in saved.names:
        name, _, key = tensor_name.rpartition(".")
        saved_keys.setdefault(name, set()).add(key)
    with_state = [name for name in names if name in saved_keys]
    for name in with_state:
        if saved_keys[name] != STATE_KEYS[optimizer_class]:
            raise UserError(
                f"the saved state of {name} is that of another optimizer than {optimizer_class}: take the "
                "--training.optimizer that it was saved with, or do not load the state (--init-optimizer false)"
            )
    return with_state


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizers:
    """Build the optimizers of ``settings``. Matrices of the blocks get weight decay; embeddings, a tied or separate head,
    norms and biases do not.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    block_matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        in_a_block = (
            len(full_shape(parameter)) >= 2 and id(parameter) not in embeddings and not name.startswith("lm_head")
        )
        (block_matrices if in_a_block else others).append((name, parameter))
    decayed = [{"params": group, "weight_decay": settings.weight_decay} for group in group_by_mesh(block_matrices)]
    undecayed = [{"params": group, "weight_decay": 0.0} for group in group_by_mesh(others)]
    adamw = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": ADAM_EPSILON,
        "fused": True,
    }
    if settings.optimizer == "adamw":
        return Optimizers(torch.optim.AdamW([*decayed, *undecayed], **adamw))
    muon = Muon(decayed, lr=settings.learning_rate, momentum=settings.muon_momentum, adjust_lr_fn="match_rms_adamw")
    return Optimizers(muon, torch.optim.AdamW(undecayed, **adamw))


def group_by_mesh(parameters: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Group ``parameters`` by device mesh: torch's fused optimizer steps take one mesh per group."""
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append((name, parameter))
    return list(groups.values())


def describe_param_groups(optimizers: Optimizers) -> Iterator[str]:
    """Yield one line for each parameter group: optimizer, weight decay, size, and the kinds of parameters in it."""
    for optimizer in optimizers.optimizers:
        for group in optimizer.param_groups:
            kinds = sorted({_parameter_kind(name) for name in group["param_names"]})
            numel = sum(full_shape(parameter).numel() for parameter in group["params"])
            yield (
                f"{type(optimizer).__name__:<5}  decay {group['weight_decay']:<5g}  {numel:>13,} parameters in "
                f"{len(group['params']):>3} tensors: {', '.join(kinds)}"
            )


def _parameter_kind(name: str) -> str:
    """Drop what blocks do not share: transformer.h.3.attn.q_proj.weight is of the kind attn.q_proj.weight."""
    return ".".join(part for part in name.split(".") if part not in ("transformer", "h") and not part.isdigit())
