"""Measure how well a reward model's scores order preference pairs: accuracy with its confidence interval, and calibration.

A reward model says that the chosen side of a pair is better with probability sigmoid(margin), where the margin is the
difference of the two scores (Bradley and Terry, 1952). It is calibrated if it is right in about 80% of the pairs in which it
is 80% confident.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_BINS = 10
Z_95 = 1.959964
"""The normal distribution holds 95% between -Z_95 and Z_95."""


@dataclass(frozen=True)
class Proportion:
    """A proportion of successes and its 95% confidence interval: Wilson's (1927), which also holds for few trials and near 0
    and 1. Ties count half."""

    value: float
    low: float
    high: float
    total: int

    @classmethod
    def of(cls, successes: float, total: int) -> "Proportion":
        """Raises a ValueError if ``total`` is 0."""
        if total < 1:
            raise ValueError("there are no pairs to count")
        value, z2 = successes / total, Z_95**2
        center = (value + z2 / (2 * total)) / (1 + z2 / total)
        half_width = Z_95 / (1 + z2 / total) * math.sqrt(value * (1 - value) / total + z2 / (4 * total**2))
        return cls(value, max(0.0, center - half_width), min(1.0, center + half_width), total)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, {self.total:,} pairs)"


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs in which the model was about equally confident."""

    confidence: float
    """Mean of sigmoid(|margin|), from 0.5 to 1."""
    accuracy: Proportion
    """Fraction of the pairs whose chosen side has the higher score."""


@dataclass(frozen=True)
class PreferenceReport:
    """Results of a reward model on held-out pairs."""

    accuracy: Proportion
    by_length: Proportion
    """Accuracy of choosing the longer side: what a model could reach by counting tokens."""
    mean_margin: float
    loss: float
    """Mean of -log sigmoid(margin), in nats; 0.693 if all scores are equal."""
    calibration_error: float
    """Mean distance between confidence and accuracy over the bins, weighted by pairs (Naeini et al., 2015)."""
    bins: tuple[CalibrationBin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as report.json has them."""
        return {
            "pairs": self.accuracy.total,
            "accuracy": self.accuracy.value,
            "accuracy_95": [self.accuracy.low, self.accuracy.high],
            "accuracy_of_the_longer_side": self.by_length.value,
            "mean_margin": self.mean_margin,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "calibration": [
                {"confidence": b.confidence, "accuracy": b.accuracy.value, "pairs": b.accuracy.total} for b in self.bins
            ],
        }


def preference_report(margins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> PreferenceReport:
    """Summarize the margins of held-out pairs.

    Args:
        margins: The score of the chosen side minus that of the rejected one, for each pair.
        lengths: The lengths of the chosen and the rejected side, for each pair.

    Raises:
        ValueError: there are no pairs, or a margin is not finite.
    """
    if len(margins) != len(lengths):
        raise ValueError(f"there are {len(margins)} margins, but lengths of {len(lengths)} pairs")
    if not_finite := [index for index, margin in enumerate(margins) if not math.isfinite(margin)]:
        raise ValueError(
            f"the scores of {len(not_finite)} pair(s) are not finite, first those of pair {not_finite[0] + 1}"
        )
    total = len(margins)
    accuracy = Proportion.of(sum(_wins(margin) for margin in margins), total)
    by_confidence = sorted(margins, key=abs)
    edges = [total * i // NUM_BINS for i in range(NUM_BINS + 1)]
    groups = [by_confidence[start:end] for start, end in itertools.pairwise(edges) if end > start]
    bins = tuple(
        CalibrationBin(
            sum(1 / (1 + math.exp(-abs(margin))) for margin in group) / len(group),
            Proportion.of(sum(_wins(margin) for margin in group), len(group)),
        )
        for group in groups
    )
    return PreferenceReport(
        accuracy=accuracy,
        by_length=Proportion.of(sum(_wins(chosen - rejected) for chosen, rejected in lengths), total),
        mean_margin=sum(margins) / total,
        loss=sum(_softplus(-margin) for margin in margins) / total,
        calibration_error=sum(b.accuracy.total * abs(b.accuracy.value - b.confidence) for b in bins) / total,
        bins=bins,
    )


def _wins(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def calibration_plot(bins: Sequence[CalibrationBin]) -> str:
    """Draw accuracy with its interval over confidence, and the diagonal of a calibrated model, as SVG."""
    size, margin = 320, 44
    inner = size - 2 * margin

    def x(confidence: float) -> float:
        return margin + (confidence - 0.5) * 2 * inner

    def y(accuracy: float) -> float:
        return size - margin - accuracy * inner

    ink, faint = "#222", "#bbb"
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}">',
        f'<g font-family="sans-serif" font-size="11" fill="{ink}">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1)}" y2="{y(1)}" stroke="{faint}" stroke-dasharray="4 3"/>',
        f'<path d="M{x(0.5)} {y(1)} V{y(0)} H{x(1)}" fill="none" stroke="{ink}"/>',
    ]
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        elements.append(f'<text x="{x(tick):.1f}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        elements.append(f'<text x="{margin - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    elements.append(f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">confidence</text>')
    elements.append(
        f'<text x="12" y="{size / 2}" text-anchor="middle" transform="rotate(-90 12 {size / 2})">accuracy</text>'
    )
    for b in bins:
        center = f"{x(b.confidence):.1f}"
        interval = f'x1="{center}" y1="{y(b.accuracy.low):.1f}" x2="{center}" y2="{y(b.accuracy.high):.1f}"'
        elements.append(f'<line {interval} stroke="#37c"/>')
        elements.append(f'<circle cx="{center}" cy="{y(b.accuracy.value):.1f}" r="3.5" fill="#37c"/>')
    return "\n".join([*elements, "</g>", "</svg>", ""])
