"""Dynamic loss scaling: gradients too small for float16 are computed as multiples, by a factor that finds itself.

Micikevicius et al., 2018, arXiv:1710.03740, section 3.2. The rule is that of `torch.amp.GradScaler`: half the factor when
a gradient overflows, whose step is not taken; twice the factor after so many steps without. GradScaler judges what one
process has of one optimizer. Here the gradient norm is judged, on which all processes agree, for all optimizers, and
what a smaller factor cannot mend is left to the guard.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the factor doubles."""
SMALLEST = 1.0


class LossScaler:
    """A power of two, so that scaling and unscaling rounds nothing. Not ``enabled`` it is 1 and stays so."""

    def __init__(self, enabled: bool, scale: float = 2.0**16, good_steps: int = 0):
        self.enabled, self.scale, self.good_steps = enabled, scale if enabled else 1.0, good_steps

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the factor, in place."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def overflow(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step whose gradients overflowed because of the factor, which is then halved; or None.

        A loss that is not finite was so before it was scaled, and a factor of 1 is to blame for nothing.
        """
        if not self.enabled:
            return None
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = 2 * self.scale, 0
            return None
        if not math.isfinite(loss) or self.scale <= SMALLEST:
            return None
        self.scale, self.good_steps = self.scale / 2, 0
        return f"the gradient norm is {grad_norm}, the loss scale is now {self.scale:g}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}
