"""Muon over matrices that lie in parts on several processes: the same update as over whole ones.

torch's own would multiply the parts in bfloat16 and round their sums, in every one of its iterations. Here each process
orthogonalises the whole matrix, one at a time; momentum and weights stay in parts.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from scratch_gpt.distributed.dtensor import shard_like, to_local


class Muon(torch.optim.Muon):
    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None and group["nesterov"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"])
        if isinstance(direction, DTensor):
            direction = direction.full_tensor()
        update = _zeropower_via_newtonschulz(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight = to_local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        weight.add_(to_local(shard_like(update, parameter)), alpha=-rate)
