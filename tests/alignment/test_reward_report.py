import math
import random
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import binomtest

from scratch_gpt.alignment.reward_report import Proportion, calibration_plot, report


@pytest.mark.parametrize(("successes", "number"), [(0, 5), (1, 7), (50, 100), (93, 100), (7, 7)])
def test_intervals_are_those_of_scipy(successes, number):
    expected = binomtest(successes, number).proportion_ci(method="wilson")
    share = Proportion.of(successes, number)
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def pairs(number, seed=0, scale=2.0):
    """Margins of a calibrated model: right with the probability that it says."""
    rng = random.Random(seed)
    margins = []
    for _ in range(number):
        sure = abs(rng.gauss(0, scale))
        margins.append(sure if rng.random() < 1 / (1 + math.exp(-sure)) else -sure)
    return margins


def test_accuracy_loss_and_margin_are_those_of_numpy():
    margins = pairs(999)
    found = report(margins, [(1, 1)] * 999)
    array = np.array(margins)
    assert found.accuracy.value == np.mean(array > 0)
    assert found.loss == pytest.approx(np.mean(np.log1p(np.exp(-array))))
    assert found.mean_margin == pytest.approx(array.mean())
    assert found.by_length.value == 0.5  # ties


def test_a_calibrated_model_lies_on_the_diagonal_and_a_boaster_below_it():
    margins = pairs(20_000)
    calibrated, boaster = (report([factor * m for m in margins], [(2, 1)] * len(margins)) for factor in (1, 5))
    assert calibrated.calibration_error < 0.02
    assert all(abs(b.accuracy.value - b.confidence) < 0.04 for b in calibrated.bins)
    assert boaster.accuracy == calibrated.accuracy
    assert boaster.calibration_error > 0.1
    assert boaster.bins[-1].confidence > boaster.bins[-1].accuracy.high
    assert calibrated.by_length.value == 1.0


def test_every_pair_is_in_one_bin_however_few_there_are():
    for number in (1, 3, 10, 37):
        found = report(pairs(number), [(1, 2)] * number)
        assert sum(b.accuracy.number for b in found.bins) == number == found.as_dict()["pairs"]
        assert [b.confidence for b in found.bins] == sorted(b.confidence for b in found.bins)


def test_the_plot_shows_each_bin_where_it_belongs():
    found = report(pairs(500), [(1, 1)] * 500)
    root = ElementTree.fromstring(calibration_plot(found.bins))
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(found.bins) == 10
    for circle, b in zip(circles, found.bins, strict=True):
        assert float(circle.get("cx")) == pytest.approx(44 + (b.confidence - 0.5) * 2 * 232, abs=0.1)
        assert float(circle.get("cy")) == pytest.approx(320 - 44 - b.accuracy.value * 232, abs=0.1)


def test_no_pairs_and_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        report([], [])
    with pytest.raises(ValueError, match=r"scores of 1 pair\(s\) are not finite, the first is pair 2"):
        report([1.0, math.nan], [(1, 1)] * 2)
