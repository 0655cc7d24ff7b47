"""The search for the largest batch, a trial that is killed, and real trials under a memory limit."""

import os
import signal

import pytest
import torch

from scratch_gpt.config import FindBatchSizeSettings, parse_settings
from scratch_gpt.planning.find_batch_size import Trial, peak_memory, run_in_subprocess, run_trial, search_batch_size
from tests.conftest import TINY_RUN


@pytest.mark.parametrize("largest", range(41))
@pytest.mark.parametrize("limit", [1, 5, 32])
def test_search_finds_the_largest_batch_and_tries_no_size_twice(largest, limit):
    trials = search_batch_size(lambda size: Trial(size, fits=size <= largest), limit)
    sizes = [trial.batch_size for trial in trials]
    assert max((trial.batch_size for trial in trials if trial.fits), default=0) == min(largest, limit)
    assert len(sizes) == len(set(sizes)) <= 12
    assert max(sizes) <= limit


def killed(settings, batch_size, limit):
    os.kill(os.getpid(), signal.SIGKILL)


def faulty(settings, batch_size, limit):
    raise KeyError("not about memory")


def test_killed_trial_does_not_fit_and_other_failures_are_raised():
    result = run_in_subprocess(killed, FindBatchSizeSettings(), 8, 0)
    assert not result.fits
    assert "signal 9" in result.failure
    with pytest.raises(RuntimeError, match="the trial of device batch size 8 failed"):
        run_in_subprocess(faulty, FindBatchSizeSettings(), 8, 0)


def test_real_trials_stop_at_the_limit():
    settings = parse_settings(FindBatchSizeSettings, [*TINY_RUN, "--training.context_length", "32"], "x")
    small = run_in_subprocess(run_trial, settings, 2, 2 * 10**9)
    assert small.fits
    assert small.tokens_per_second > 0
    # far beyond the limit: the activations of 20,000 sequences are gigabytes
    large = run_in_subprocess(run_trial, settings, 20_000, small.peak_bytes + 200 * 10**6)
    assert not large.fits
    assert "out of memory" in large.failure
    assert (
        0 < large.peak_bytes < small.peak_bytes + 300 * 10**6
    )  # the allocation failed; it was not measured afterwards


def test_peak_memory_includes_freed_memory():
    before = peak_memory("cpu")
    torch.ones(100_000_000)
    assert peak_memory("cpu") >= min(before + 1, 4e8)
