"""Accuracy, intervals and calibration equal those of NumPy and SciPy."""

import math
import random
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import binomtest

from scratch_gpt.alignment.reward_report import Proportion, calibration_plot, preference_report


@pytest.mark.parametrize(("successes", "total"), [(0, 5), (1, 7), (50, 100), (93, 100), (7, 7)])
def test_intervals_equal_scipys(successes, total):
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    proportion = Proportion.of(successes, total)
    assert (proportion.low, proportion.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def calibrated_margins(count, seed=0, scale=2.0):
    """Margins of a model that is right with probability sigmoid(|margin|)."""
    rng = random.Random(seed)
    margins = []
    for _ in range(count):
        size = abs(rng.gauss(0, scale))
        margins.append(size if rng.random() < 1 / (1 + math.exp(-size)) else -size)
    return margins


def test_accuracy_loss_and_margin_equal_numpys():
    margins = calibrated_margins(999)
    result = preference_report(margins, [(1, 1)] * 999)
    array = np.array(margins)
    assert result.accuracy.value == np.mean(array > 0)
    assert result.loss == pytest.approx(np.mean(np.log1p(np.exp(-array))))
    assert result.mean_margin == pytest.approx(array.mean())
    assert result.by_length.value == 0.5  # ties


def test_a_calibrated_model_is_on_the_diagonal_and_an_overconfident_one_below_it():
    margins = calibrated_margins(20_000)
    calibrated, overconfident = (
        preference_report([factor * m for m in margins], [(2, 1)] * len(margins)) for factor in (1, 5)
    )
    assert calibrated.calibration_error < 0.02
    assert all(abs(b.accuracy.value - b.confidence) < 0.04 for b in calibrated.bins)
    assert overconfident.accuracy == calibrated.accuracy
    assert overconfident.calibration_error > 0.1
    assert overconfident.bins[-1].confidence > overconfident.bins[-1].accuracy.high
    assert calibrated.by_length.value == 1.0


def test_every_pair_is_in_one_bin():
    for count in (1, 3, 10, 37):
        result = preference_report(calibrated_margins(count), [(1, 2)] * count)
        assert sum(b.accuracy.total for b in result.bins) == count == result.as_dict()["pairs"]
        assert [b.confidence for b in result.bins] == sorted(b.confidence for b in result.bins)


def test_the_plot_shows_each_bin_at_its_coordinates():
    result = preference_report(calibrated_margins(500), [(1, 1)] * 500)
    root = ElementTree.fromstring(calibration_plot(result.bins))
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(result.bins) == 10
    for circle, b in zip(circles, result.bins, strict=True):
        assert float(circle.get("cx")) == pytest.approx(44 + (b.confidence - 0.5) * 2 * 232, abs=0.1)
        assert float(circle.get("cy")) == pytest.approx(320 - 44 - b.accuracy.value * 232, abs=0.1)


def test_no_pairs_and_non_finite_scores_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        preference_report([], [])
    with pytest.raises(ValueError, match=r"scores of 1 pair\(s\) are not finite, first those of pair 2"):
        preference_report([1.0, math.nan], [(1, 1)] * 2)
