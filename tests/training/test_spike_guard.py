"""Which steps the spike guard skips."""

import math

import pytest

from scratch_gpt.config import GuardSettings
from scratch_gpt.training.spike_guard import SpikeGuard, summarize_events


def filled_guard(settings=None, losses=None):
    """A guard with a full window; the logarithms deviate by 0.1 from a loss of 3 and by 0.05 from a gradient norm of 1."""
    guard = SpikeGuard(settings or GuardSettings(window=50))
    for step, loss in enumerate(losses or [3.0 * math.exp(0.1 * (-1) ** step) for step in range(60)]):
        assert guard.problem(loss, math.exp(0.05 * (-1) ** step)) is None
    return guard


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_a_non_finite_step_is_bad_from_the_first_step_on(loss, grad_norm):
    for guard in (SpikeGuard(GuardSettings(sigmas=0)), filled_guard()):
        assert "is nan" in (problem := guard.problem(loss, grad_norm)) or "is inf" in problem
        assert guard.skipped == 1 and all(map(math.isfinite, guard.losses + guard.grad_norms))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "bad"),
    [
        (3.0 * math.exp(0.5), math.exp(0.2), None),  # 5 and 4 deviations
        (3.0 * math.exp(0.7), 1.0, "the loss is 6.041, 7.0 standard deviations above the mean 3"),
        (3.0, math.exp(0.4), "the gradient norm is 1.492, 8.0 standard deviations above the mean 1"),
        (0.1, 0.1, None),  # a low loss is never a spike
    ],
)
def test_six_standard_deviations_above_the_mean_are_bad(loss, grad_norm, bad):
    problem = filled_guard().problem(loss, grad_norm)
    assert (problem is None) == (bad is None)
    assert bad is None or bad in problem


def test_sigmas_0_accepts_every_finite_step():
    assert filled_guard(GuardSettings(sigmas=0)).problem(1e9, 1e9) is None


def test_nothing_is_skipped_early_in_a_run_or_for_tiny_deviations():
    guard = SpikeGuard(GuardSettings(window=50))
    for step in range(50):
        assert guard.problem(3.0, 2.0 if step < 22 else 80.0) is None
    assert filled_guard(losses=[2.0] * 60).problem(2.2, 1.0) is None


def test_the_window_holds_only_the_newest_good_steps():
    guard = filled_guard(GuardSettings(window=30))
    before = guard.state()
    guard.problem(99.0, 1.0)
    assert guard.losses == before["losses"] and len(guard.losses) == len(guard.grad_norms) == 30


def test_bad_steps_in_a_row_lead_to_a_rollback_and_rollbacks_to_giving_up():
    guard = filled_guard(GuardSettings(window=50, max_skips=2, max_rollbacks=2))
    saved = guard.state()
    assert guard.problem(3.1, 1.0) is None and guard.losses != saved["losses"]
    for _ in range(2):
        for expected in (False, True):
            assert guard.problem(99.0, 1.0) and guard.must_roll_back == expected
        guard.rolled_back(saved)
        assert (guard.losses, guard.grad_norms) == (saved["losses"], saved["grad_norms"])
    assert guard.must_give_up and not guard.must_roll_back
    assert guard.problem(3.0, 1.0) is None and not guard.must_give_up


def test_an_accepted_loss_is_the_new_normal():
    guard = filled_guard()
    assert guard.problem(99.0, 1.0)
    guard.accept()
    assert guard.skipped == 0 and guard.problem(99.0, 1.0) is None


def test_its_state_restores_it():
    guard = filled_guard()
    guard.problem(math.nan, 1.0)
    restored = SpikeGuard(guard.settings, **guard.state())
    assert restored == guard
    assert restored.problem(3.2, 1.0) == guard.problem(3.2, 1.0) and restored == guard


def test_events_are_summarized_by_kind():
    events = [{"event": "skipped", "step": step} for step in range(1, 13)] + [{"event": "rolled back", "step": 1_000}]
    events.append({"event": "benchmark", "step": 5})
    assert (
        summarize_events(events)
        == "12 x skipped (steps 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...); 1 x rolled back (step 1,000)"
    )
    assert summarize_events([{"event": "benchmark", "step": 5}]) == ""
