"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

AdamW with decoupled weight decay: Loshchilov and Hutter, 2019, arXiv:1711.05101. Muon orthogonalises the momentum of a
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

EPSILON = 1e-8
STATE_OF = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""What each kind of optimizer keeps for a parameter."""


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
        """Drop the gradients rather than fill them with zeros."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state as flat tensors named {parameter}.{state}, each as its parameter is spread."""
        return {
            f"{name}.{key}": value.detach()
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for key, value in optimizer.state[parameter].items()
        }

    def load_state_tensors(self, saved: SafetensorsReader) -> None:
        """Inverse of :meth:`state_tensors`, for optimizers over parameters of the same names: each process reads its parts.

        Raises:
            UserError: they are the state of another kind of optimizer, or of another model.
        """
        for optimizer in self.optimizers:
            kind = type(optimizer).__name__
            parameters = {
                name: parameter
                for group in optimizer.param_groups
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
            }
            there = with_state(saved, parameters, kind)
            states = {
                index: {key: saved.read(f"{name}.{key}", parameter) for key in sorted(STATE_OF[kind])}
                for index, (name, parameter) in enumerate(parameters.items())
                if name in there
            }
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizers:
    """Matrices of the blocks decay; embeddings (the tied head with them), the head, norms and biases do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        in_a_block = (
            len(full_shape(parameter)) >= 2 and id(parameter) not in embeddings and not name.startswith("lm_head")
        )
        (matrices if in_a_block else others).append((name, parameter))
    decayed = [{"params": some, "weight_decay": settings.weight_decay} for some in alike(matrices)]
    rest = [{"params": some, "weight_decay": 0.0} for some in alike(others)]
    adamw = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": EPSILON, "fused": True}
    if settings.optimizer == "adamw":
        return Optimizers(torch.optim.AdamW([*decayed, *rest], **adamw))
    muon = Muon(decayed, lr=settings.learning_rate, momentum=settings.muon_momentum, adjust_lr_fn="match_rms_adamw")
    return Optimizers(muon, torch.optim.AdamW(rest, **adamw))


def alike(parameters: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """``parameters`` in groups that are spread over the same processes, as torch's fused steps need them."""
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(
            (name, parameter)
        )
    return list(groups.values())


def describe(optimizers: Optimizers) -> Iterator[str]:
    """One line for each parameter group: who updates it, its decay, its size, and which modules it covers."""
    for optimizer in optimizers.optimizers:
        for group in optimizer.param_groups:
            modules = sorted({_kind(name) for name in group["param_names"]})
            number = sum(full_shape(parameter).numel() for parameter in group["params"])
            yield (
                f"{type(optimizer).__name__:<5}  decay {group['weight_decay']:<5g}  {number:>13,} parameters in "
                f"{len(group['params']):>3} tensors: {', '.join(modules)}"
            )


def _kind(name: str) -> str:
    """transformer.h.3.attn.q_proj.weight is of the kind attn.q_proj.weight."""
    return ".".join(part for part in name.split(".") if part not in ("transformer", "h") and not part.isdigit())


def with_state(saved: SafetensorsReader, names: Iterable[str], kind: str) -> list[str]:
    """Those of ``names`` of whose parameters ``saved`` has the state.

    Raises:
        UserError: it is that of another kind of optimizer than ``kind``.
    """
    states: dict[str, set[str]] = {}
    for key in saved.names:
        name, _, state = key.rpartition(".")
        states.setdefault(name, set()).add(state)
    there = [name for name in names if name in states]
    for name in there:
        if states[name] != STATE_OF[kind]:
            raise UserError(
                f"the state of {name} is that of another optimizer than {kind}: take the --training.optimizer that it was "
                "saved with, or leave its state behind (--init-optimizer false)"
            )
    return there
