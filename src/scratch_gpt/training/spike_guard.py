"""Keep loss spikes and non-finite gradients away from the weights.

A step is skipped if its loss or gradient norm is not finite, or more than ``sigmas`` standard deviations above the mean
of the last ``window`` good steps: its data is dropped, and the step is retried with the data that follows (as in OLMo 2,
2025, arXiv:2501.00656, section 3.1; here on a logarithmic scale, since gradient norms have a long tail). After
``max_skips`` bad steps in a row, the weights are the likely cause, not the data: training rolls back to the newest
checkpoint and continues from there with the data that follows. A loss that stays high even then, but finite, is accepted
as the new normal, so that the guard never stops a run that would have recovered.

The verdict is a pure function of values that all ranks agree on and of a window that checkpoints save.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from scratch_gpt.config import GuardSettings

MIN_DEVIATION = 0.02
"""Lower limit of the standard deviation of the logarithm, so that small changes of a steady loss are not skipped."""

EVENTS = ("skipped", "rolled back", "accepted", "overflow")
MAX_STEPS_LISTED = 10
"""Steps listed per kind of event in a summary."""


@dataclass
class SpikeGuard:
    settings: GuardSettings
    losses: list[float] = field(default_factory=list)
    """Losses of the last good steps."""
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    """Bad steps in a row."""
    rollbacks: int = 0
    """Rollbacks since the last good step."""

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """Judge a step: returns what is wrong with it, or None for a good step, which enters the window."""
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", grad_norm, self.grad_norms)):
            if not math.isfinite(value):
                self.skipped += 1
                return f"the {name} is {value}"
            if self.settings.sigmas > 0 and (deviation := self._deviation(value, window)) > self.settings.sigmas:
                self.skipped += 1
                mean = _geometric_mean(window)
                return f"the {name} is {value:.4g}, {deviation:.1f} standard deviations above the mean {mean:.4g}"
        for value, window in ((loss, self.losses), (grad_norm, self.grad_norms)):
            window.append(value)
            del window[: -self.settings.window]
        self.skipped = self.rollbacks = 0
        return None

    @property
    def must_roll_back(self) -> bool:
        return self.skipped >= self.settings.max_skips

    @property
    def must_give_up(self) -> bool:
        return self.rollbacks >= self.settings.max_rollbacks

    def rolled_back(self, checkpoint_state: dict[str, Any]) -> None:
        """Count a rollback, and restore the window from the :meth:`state` of the checkpoint."""
        self.losses, self.grad_norms = list(checkpoint_state["losses"]), list(checkpoint_state["grad_norms"])
        self.rollbacks += 1
        self.skipped = 0

    def accept(self) -> None:
        """Clear the window, so that the next steps define what is normal."""
        self.losses, self.grad_norms = [], []
        self.skipped = self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        """Constructor arguments that restore this state, for checkpoints."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
        }

    def _deviation(self, value: float, window: list[float]) -> float:
        """Return the distance of ``value`` above the mean in standard deviations, on a logarithmic scale."""
        if len(window) < self.settings.window:  # early in a run, the loss changes too fast to tell what is normal
            return 0.0
        logs = [_log(one) for one in window]
        mean = statistics.fmean(logs)
        deviation = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / len(logs))  # pstdev is 20 times as slow
        return (_log(value) - mean) / max(deviation, MIN_DEVIATION)


def summarize_events(events: list[dict[str, Any]]) -> str:
    """One line on what the guard did: number and steps of each kind of event in metrics.jsonl. Empty if none."""
    steps_by_kind: dict[str, list[int]] = {}
    for event in events:
        if event["event"] in EVENTS:
            steps_by_kind.setdefault(event["event"], []).append(event["step"])
    summaries = []
    for kind, steps in steps_by_kind.items():
        listed = [f"{step:,}" for step in steps[:MAX_STEPS_LISTED]] + ["..."] * (len(steps) > MAX_STEPS_LISTED)
        summaries.append(f"{len(steps)} x {kind} ({'step' if len(steps) == 1 else 'steps'} {', '.join(listed)})")
    return "; ".join(summaries)


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(_log, values)))
