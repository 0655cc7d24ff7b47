"""The guard: losses that jump and gradients that are not finite do not reach the weights.

A step whose loss or gradient norm is not finite, or lies ``sigmas`` standard deviations above the mean of the last
``window`` good steps, is skipped: its rows are passed over and the step is done with the next ones (as OLMo 2 does, 2025,
arXiv:2501.00656, section 3.1; here on a logarithmic scale, since gradient norms have a long tail). After ``max_skips``
bad steps in a row the trouble is in the weights rather than in the data: the loop goes back to the newest checkpoint and
on from there with the data that follows. What stays high even then, but finite, is taken for the new normal: the guard
stops no run that would have got over it.

The verdict is a pure function of what all processes have agreed on, and of a window that checkpoints carry.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from scratch_gpt.config import GuardSettings

NARROWEST = 0.02
"""Smallest standard deviation of the logarithm: a loss that hardly varies is no reason to skip small changes."""

EVENTS = ("skipped", "rolled back", "accepted", "overflow")
STEPS_NAMED = 10
"""Of each kind of event, in a summary."""


@dataclass
class SpikeGuard:
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
                    f"the {name} is {value:.4g}, {deviation:.1f} standard deviations above the mean {_mean(seen):.4g}"
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

    def accept(self) -> None:
        """Begin anew: what was out of line is what is to be expected now."""
        self.losses, self.grad_norms = [], []
        self.skipped = self.rollbacks = 0

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

    def _deviation(self, value: float, seen: list[float]) -> float:
        if len(seen) < self.settings.window:  # early on a deviation cannot be told from the run finding its feet
            return 0.0
        logs = [_log(one) for one in seen]
        mean = statistics.fmean(logs)
        deviation = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / len(logs))  # pstdev is 20 times as slow
        return (_log(value) - mean) / max(deviation, NARROWEST)


def summarize_events(events: list[dict[str, Any]]) -> str:
    """What the guard did in a run, kind by kind with the steps, from the events of its metrics; empty if nothing."""
    steps: dict[str, list[int]] = {}
    for event in events:
        if event["event"] in EVENTS:
            steps.setdefault(event["event"], []).append(event["step"])
    parts = []
    for kind, of_kind in steps.items():
        named = [f"{step:,}" for step in of_kind[:STEPS_NAMED]] + ["..."] * (len(of_kind) > STEPS_NAMED)
        parts.append(f"{len(of_kind)} x {kind} ({'step' if len(of_kind) == 1 else 'steps'} {', '.join(named)})")
    return "; ".join(parts)


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(_log, values)))
