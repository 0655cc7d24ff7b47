"""Dynamic loss scaling for float16, so that small gradients do not underflow.

Micikevicius et al., 2018, arXiv:1710.03740, section 3.2, with the rule of `torch.amp.GradScaler`: when a gradient
overflows, the step is skipped and the scale is halved; after many steps without overflow it is doubled. GradScaler
inspects the gradients that one process holds for one optimizer. This one inspects the global gradient norm, which all
ranks agree on, for all optimizers together; an overflow that a smaller scale cannot fix is the spike guard's.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale doubles."""
MIN_SCALE = 1.0


class LossScaler:
    """The scale is a power of two, so that scaling and unscaling are exact. If not ``enabled`` it stays at 1."""

    def __init__(self, enabled: bool, scale: float = 2.0**16, good_steps: int = 0):
        self.enabled, self.scale, self.good_steps = enabled, scale if enabled else 1.0, good_steps

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def overflow(self, loss: float, grad_norm: float) -> str | None:
        """Update the scale after a step. Returns a message if the gradients overflowed because of it, else None.

        A non-finite loss has another cause, since it is computed before scaling; so has an overflow at scale 1.
        """
        if not self.enabled:
            return None
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = 2 * self.scale, 0
            return None
        if not math.isfinite(loss) or self.scale <= MIN_SCALE:
            return None
        self.scale, self.good_steps = self.scale / 2, 0
        return f"the gradient norm is {grad_norm}, the loss scale is now {self.scale:g}"

    def state(self) -> dict[str, Any]:
        """Constructor arguments that restore this state, for checkpoints."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}
