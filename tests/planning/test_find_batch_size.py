"""The search for the largest batch, a try that is killed, real tries under a limit, and the advice of an error."""

import os
import re
import signal

import pytest
import torch

from scratch_gpt.config import FindBatchSizeSettings, PretrainSettings, TrainingSettings, parse_settings
from scratch_gpt.planning.find_batch_size import Try, in_a_process, peak_memory, search, try_batch
from scratch_gpt.training.out_of_memory import is_out_of_memory, out_of_memory_advice
from tests.conftest import TINY_RUN


@pytest.mark.parametrize("largest", range(41))
@pytest.mark.parametrize("limit", [1, 5, 32])
def test_search_finds_the_largest_batch_and_tries_none_twice(largest, limit):
    tries = search(lambda rows: Try(rows, fits=rows <= largest), limit)
    asked = [one.rows for one in tries]
    assert max((one.rows for one in tries if one.fits), default=0) == min(largest, limit)
    assert len(asked) == len(set(asked)) <= 12
    assert max(asked) <= limit


def killed(settings, rows, limit):
    os.kill(os.getpid(), signal.SIGKILL)


def faulty(settings, rows, limit):
    raise KeyError("no memory trouble at all")


def test_a_try_that_the_system_kills_did_not_fit_and_another_failure_is_not_hidden():
    result = in_a_process(killed, FindBatchSizeSettings(), 8, 0)
    assert not result.fits
    assert "signal 9" in result.why_not
    with pytest.raises(RuntimeError, match="trying 8 rows failed"):
        in_a_process(faulty, FindBatchSizeSettings(), 8, 0)


def test_real_tries_stop_at_the_limit():
    settings = parse_settings(FindBatchSizeSettings, [*TINY_RUN, "--training.context_length", "32"], "x")
    small = in_a_process(try_batch, settings, 2, 2 * 10**9)
    assert small.fits
    assert small.tokens_per_second > 0
    # beyond by far: the activations of 20,000 rows are gigabytes
    large = in_a_process(try_batch, settings, 20_000, small.peak_bytes + 200 * 10**6)
    assert not large.fits
    assert "out of memory" in large.why_not
    assert 0 < large.peak_bytes < small.peak_bytes + 300 * 10**6  # refused, not taken and then found too much


def test_peak_memory_sees_what_was_taken_and_given_back():
    before = peak_memory("cpu")
    torch.ones(100_000_000)
    assert peak_memory("cpu") >= min(before + 1, 4e8)


def cpu_error():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error


CUDA_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.00 GiB free. More text."
)


@pytest.mark.parametrize("error", [cpu_error(), CUDA_ERROR, MemoryError()])
def test_an_out_of_memory_error_says_what_to_change_in_order(error):
    assert is_out_of_memory(error)
    settings = PretrainSettings(training=TrainingSettings(device_batch_size=24, context_length=1024))
    advice = out_of_memory_advice(error, settings)
    ways = [
        "--training.device_batch_size 12 (now 24",
        "--training.activation_checkpointing full",
        "--training.context_length",
    ]
    places = [advice.index(way) for way in ways]
    assert places == sorted(places)
    assert "512 (now 1024)" in advice
    assert "\n" not in advice


def test_the_advice_quotes_how_much_was_asked_for():
    assert "asked for 2.50 GiB" in out_of_memory_advice(CUDA_ERROR, PretrainSettings())
    assert re.search(r"asked for \d+ bytes", out_of_memory_advice(cpu_error(), PretrainSettings()))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"device_batch_size": 1, "context_length": 64}, "first recompute activations"),
        ({"context_length": 64, "total_batch_size": 640}, "device_batch_size 5 (now the full step, 10 sequences"),
        ({"device_batch_size": 7}, "device_batch_size 1 (now 7"),
        ({}, "first set --training.device_batch_size to fewer sequences"),
    ],
)
def test_the_first_advice_fits_the_settings(training, expected):
    assert expected in out_of_memory_advice(CUDA_ERROR, PretrainSettings(training=TrainingSettings(**training)))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("bad_alloc")])
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
