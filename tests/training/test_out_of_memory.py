"""Out-of-memory errors are recognized, and their message says what to change."""

import re

import pytest
import torch

from scratch_gpt.config import PretrainSettings, TrainingSettings
from scratch_gpt.training.out_of_memory import is_out_of_memory, out_of_memory_advice


def cpu_error():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error


CUDA_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.00 GiB free. More text."
)


@pytest.mark.parametrize("error", [cpu_error(), CUDA_ERROR, MemoryError()])
def test_advice_lists_changes_from_mild_to_severe(error):
    assert is_out_of_memory(error)
    settings = PretrainSettings(training=TrainingSettings(device_batch_size=24, context_length=1024))
    advice = out_of_memory_advice(error, settings)
    ways = [
        "--training.device_batch_size 12 (now 24",
        "--training.activation_checkpointing full",
        "--training.context_length",
    ]
    positions = [advice.index(way) for way in ways]
    assert positions == sorted(positions)
    assert "512 (now 1024)" in advice
    assert "\n" not in advice


def test_advice_quotes_the_requested_amount():
    assert "requested 2.50 GiB" in out_of_memory_advice(CUDA_ERROR, PretrainSettings())
    assert re.search(r"requested \d+ bytes", out_of_memory_advice(cpu_error(), PretrainSettings()))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"device_batch_size": 1, "context_length": 64}, "first recompute activations"),
        ({"context_length": 64, "total_batch_size": 640}, "device_batch_size 5 (now the full step, 10 sequences"),
        ({"device_batch_size": 7}, "device_batch_size 1 (now 7"),
        ({}, "first set --training.device_batch_size to fewer sequences"),
    ],
)
def test_first_advice_depends_on_the_settings(training, expected):
    assert expected in out_of_memory_advice(CUDA_ERROR, PretrainSettings(training=TrainingSettings(**training)))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("bad_alloc")])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)
