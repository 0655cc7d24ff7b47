"""Muon for matrices that are sharded over ranks, with the same update as on one process.

torch's `Muon` on DTensors would multiply shards in bfloat16 and round the partial sums in every iteration. Here each rank
gathers one full matrix at a time and orthogonalizes it; momentum and weights stay sharded.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from scratch_gpt.distributed.dtensor import shard_like, to_local


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with Nesterov momentum, for plain matrices and DTensors."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None and group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])
        if isinstance(direction, DTensor):
            direction = direction.full_tensor()
        update = orthogonalize(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight = to_local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(to_local(shard_like(update, parameter)), alpha=-match_rms_adamw(group["lr"], parameter.shape))


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Return roughly U V^T, in bfloat16, of ``matrix`` = U S V^T, by the quintic Newton-Schulz iteration.

    Jordan et al., 2024, kellerjordan.github.io/posts/muon; the same operations as in `torch.optim.Muon`.
    """
    a, b, c = coefficients
    x = matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        x = x.T
    x.div_(x.norm().clamp(min=eps))  # the iteration needs singular values of at most 1
    for _ in range(num_steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x


def match_rms_adamw(learning_rate: float, shape: torch.Size) -> float:
    """Scale ``learning_rate`` so that the update has the RMS of an AdamW update (Liu et al., 2025, arXiv:2502.16982)."""
    return learning_rate * (0.2 * math.sqrt(max(shape)))
