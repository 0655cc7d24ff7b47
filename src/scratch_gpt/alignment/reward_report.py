"""How well scores order pairs of completions: accuracy with its confidence interval, calibration, and what length alone does.

A reward model says that the chosen side of a pair is better with probability sigmoid(margin), where the margin is the
difference of the two scores (Bradley and Terry, 1952). It is calibrated if, among pairs where it is 80% sure, it is right
about 80% of the time.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_BINS = 10
Z_95 = 1.959964
"""Two-sided 95% of the normal distribution."""


@dataclass(frozen=True)
class Proportion:
    """A share of successes and its 95% confidence interval, by Wilson's score (1927), which holds for small numbers and near
    0 and 1 as well. Ties count half."""

    value: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, successes: float, number: int) -> "Proportion":
        if number < 1:
            raise ValueError("a share of nothing: there are no pairs to count")
        share, z2 = successes / number, Z_95**2
        centre = (share + z2 / (2 * number)) / (1 + z2 / number)
        half = Z_95 / (1 + z2 / number) * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2))
        return cls(share, max(0.0, centre - half), min(1.0, centre + half), number)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, {self.number:,} pairs)"


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of which the model was about equally sure."""

    confidence: float
    """Mean of sigmoid(|margin|), from 0.5 to 1."""
    accuracy: Proportion
    """How often its choice was right."""


@dataclass(frozen=True)
class PreferenceReport:
    """What margins on held-out pairs say about a reward model."""

    accuracy: Proportion
    by_length: Proportion
    """Accuracy of a judge that takes the longer side: what a model could reach by counting tokens."""
    mean_margin: float
    loss: float
    """-log sigmoid(margin), in nats; 0.693 for a model that knows nothing."""
    calibration_error: float
    """Mean distance between confidence and accuracy over the bins, weighted by pairs (Naeini et al., 2015)."""
    bins: tuple[CalibrationBin, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pairs": self.accuracy.number,
            "accuracy": self.accuracy.value,
            "accuracy_95": [self.accuracy.low, self.accuracy.high],
            "accuracy_of_the_longer_side": self.by_length.value,
            "mean_margin": self.mean_margin,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "calibration": [
                {"confidence": b.confidence, "accuracy": b.accuracy.value, "pairs": b.accuracy.number}
                for b in self.bins
            ],
        }


def report(margins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> PreferenceReport:
    """``margins``: score of the chosen side minus that of the rejected one, a number for each pair; ``lengths``: of both.

    Raises:
        ValueError: no pairs, or a margin that is not finite.
    """
    if len(margins) != len(lengths):
        raise ValueError(f"there are {len(margins)} margins, but lengths of {len(lengths)} pairs")
    if wrong := [number for number, margin in enumerate(margins) if not math.isfinite(margin)]:
        raise ValueError(f"the scores of {len(wrong)} pair(s) are not finite, the first is pair {wrong[0] + 1}")
    number = len(margins)
    accuracy = Proportion.of(sum(_wins(margin) for margin in margins), number)
    ordered = sorted(margins, key=abs)
    edges = [number * i // NUM_BINS for i in range(NUM_BINS + 1)]
    groups = [ordered[start:end] for start, end in itertools.pairwise(edges) if end > start]
    bins = tuple(
        CalibrationBin(
            sum(1 / (1 + math.exp(-abs(margin))) for margin in group) / len(group),
            Proportion.of(sum(_wins(margin) for margin in group), len(group)),
        )
        for group in groups
    )
    return PreferenceReport(
        accuracy=accuracy,
        by_length=Proportion.of(sum(_wins(chosen - rejected) for chosen, rejected in lengths), number),
        mean_margin=sum(margins) / number,
        loss=sum(_softplus(-margin) for margin in margins) / number,
        calibration_error=sum(b.accuracy.number * abs(b.accuracy.value - b.confidence) for b in bins) / number,
        bins=bins,
    )


def _wins(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def calibration_plot(bins: Sequence[CalibrationBin]) -> str:
    """An SVG: accuracy with its interval over confidence, and the diagonal on which a calibrated model lies."""
    size, margin = 320, 44
    inner = size - 2 * margin

    def x(confidence: float) -> float:
        return margin + (confidence - 0.5) * 2 * inner

    def y(accuracy: float) -> float:
        return size - margin - accuracy * inner

    ink, faint = "#222", "#bbb"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">',
        f'<g font-family="sans-serif" font-size="11" fill="{ink}">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1)}" y2="{y(1)}" stroke="{faint}" stroke-dasharray="4 3"/>',
        f'<path d="M{x(0.5)} {y(1)} V{y(0)} H{x(1)}" fill="none" stroke="{ink}"/>',
    ]
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        parts.append(f'<text x="{x(tick):.1f}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<text x="{margin - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">how sure the model is</text>')
    parts.append(
        f'<text x="12" y="{size / 2}" text-anchor="middle" transform="rotate(-90 12 {size / 2})">how often it is right</text>'
    )
    for b in bins:
        at = f"{x(b.confidence):.1f}"
        interval = f'x1="{at}" y1="{y(b.accuracy.low):.1f}" x2="{at}" y2="{y(b.accuracy.high):.1f}"'
        parts.append(f'<line {interval} stroke="#37c"/>')
        parts.append(f'<circle cx="{at}" cy="{y(b.accuracy.value):.1f}" r="3.5" fill="#37c"/>')
    return "\n".join([*parts, "</g>", "</svg>", ""])
