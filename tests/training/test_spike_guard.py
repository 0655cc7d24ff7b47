"""Which steps the guard lets through."""

import math

import pytest

from scratch_gpt.config import GuardSettings
from scratch_gpt.training.spike_guard import SpikeGuard


def filled(settings=None, losses=None):
    """Logarithms of the losses of 3 with a deviation of 0.1, and of gradient norms of 1 with one of 0.05."""
    guard = SpikeGuard(settings or GuardSettings(window=50))
    for step, loss in enumerate(losses or [3.0 * math.exp(0.1 * (-1) ** step) for step in range(60)]):
        assert guard.problem(loss, math.exp(0.05 * (-1) ** step)) is None
    return guard


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step_on(loss, grad_norm):
    for guard in (SpikeGuard(GuardSettings(sigmas=0)), filled()):
        assert "is nan" in (problem := guard.problem(loss, grad_norm)) or "is inf" in problem
        assert guard.skipped == 1 and all(map(math.isfinite, guard.losses + guard.grad_norms))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "bad"),
    [
        (3.0 * math.exp(0.5), math.exp(0.2), None),  # 5 and 4 deviations
        (3.0 * math.exp(0.7), 1.0, "the loss is 6.041, 7.0 standard deviations above the mean 3"),
        (3.0, math.exp(0.4), "the gradient norm is 1.492, 8.0 standard deviations above the mean 1"),
        (0.1, 0.1, None),  # falling is what losses are for
    ],
)
def test_six_standard_deviations_above_the_mean_are_bad(loss, grad_norm, bad):
    problem = filled().problem(loss, grad_norm)
    assert (problem is None) == (bad is None)
    assert bad is None or bad in problem


def test_sigmas_0_takes_every_finite_step():
    assert filled(GuardSettings(sigmas=0)).problem(1e9, 1e9) is None


def test_at_the_beginning_and_for_hardly_any_variation_nothing_is_skipped():
    guard = SpikeGuard(GuardSettings(window=50))
    for step in range(50):
        assert guard.problem(3.0, 2.0 if step < 22 else 80.0) is None
    assert filled(losses=[2.0] * 60).problem(2.2, 1.0) is None


def test_the_window_holds_good_steps_only_and_the_newest():
    guard = filled(GuardSettings(window=30))
    before = guard.state()
    guard.problem(99.0, 1.0)
    assert guard.losses == before["losses"] and len(guard.losses) == len(guard.grad_norms) == 30


def test_bad_steps_in_a_row_lead_to_a_rollback_and_rollbacks_to_giving_up():
    guard = filled(GuardSettings(window=50, max_skips=2, max_rollbacks=2))
    saved = guard.state()
    assert guard.problem(3.1, 1.0) is None and guard.losses != saved["losses"]
    for _ in range(2):
        for expected in (False, True):
            assert guard.problem(99.0, 1.0) and guard.must_roll_back == expected
        guard.rolled_back(saved)
        assert (guard.losses, guard.grad_norms) == (saved["losses"], saved["grad_norms"])
    assert guard.must_give_up and not guard.must_roll_back
    assert guard.problem(3.0, 1.0) is None and not guard.must_give_up


def test_what_is_accepted_is_the_new_normal():
    guard = filled()
    assert guard.problem(99.0, 1.0)
    guard.accept()
    assert guard.skipped == 0 and guard.problem(99.0, 1.0) is None


def test_its_state_makes_a_twin():
    guard = filled()
    guard.problem(math.nan, 1.0)
    twin = SpikeGuard(guard.settings, **guard.state())
    assert twin == guard
    assert twin.problem(3.2, 1.0) == guard.problem(3.2, 1.0) and twin == guard
