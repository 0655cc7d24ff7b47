"""The guard: losses that jump and gradients that are not finite do not reach the weights.

A step whose loss or gradient norm is not finite, or lies ``sigmas`` standard deviations above the mean of the last
``window`` good steps, is skipped: its rows are passed over and the step is done with the next ones (the rule of OLMo 2,
2025, arXiv:2501.00656, section 3.1). After ``max_skips`` bad steps in a row the trouble is in the weights rather than
in the data: the loop goes back to the newest checkpoint and on from there with the data that follows.

The verdict is a pure function of what all processes have agreed on, and of a window that checkpoints carry.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from scratch_gpt.config import GuardSettings

FEWEST_STEPS = 20
"""Good steps before a deviation can be told from the fall of the loss at the beginning."""
NARROWEST = 0.02
"""Smallest standard deviation, as a share of the mean: a loss that hardly varies is no reason to skip small changes."""


@dataclass
class Guard:
    settings: GuardSettings
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    """Bad steps in a row."""
    rollbacks: int = 0
    """Rollbacks since the last good step."""

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None; a good one enters the window."""
        for name, value, seen in (("loss", loss, self.losses), ("gradient norm", grad_norm, self.grad_norms)):
            if not math.isfinite(value):
                return self._bad(f"the {name} is {value}")
            if self.settings.sigmas > 0 and (deviation := self._deviation(value, seen)) > self.settings.sigmas:
                return self._bad(
                    f"the {name} is {value:.4g}, {deviation:.1f} standard deviations above the mean {statistics.fmean(seen):.4g}"
                )
        for value, seen in ((loss, self.losses), (grad_norm, self.grad_norms)):
            seen.append(value)
            del seen[: -self.settings.window]
        self.skipped = self.rollbacks = 0
        return None

    @property
    def must_roll_back(self) -> bool:
        return self.skipped >= self.settings.max_skips

    @property
    def must_give_up(self) -> bool:
        return self.rollbacks >= self.settings.max_rollbacks

    def rolled_back(self, state: dict[str, Any]) -> None:
        """The weights are those of a checkpoint with this ``state`` again, and so is the window."""
        self.losses, self.grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.rollbacks += 1
        self.skipped = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
        }

    def _bad(self, problem: str) -> str:
        self.skipped += 1
        return problem

    @staticmethod
    def _deviation(value: float, seen: list[float]) -> float:
        if len(seen) < FEWEST_STEPS:
            return 0.0
        mean = statistics.fmean(seen)
        return (value - mean) / max(statistics.pstdev(seen, mean), NARROWEST * abs(mean), 1e-12)
