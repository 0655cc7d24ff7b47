"""Learning rate and batch size schedules against their definitions, and against transformers."""

import numpy as np
import pytest
import torch
from transformers import get_wsd_schedule

from scratch_gpt.config import TrainingSettings
from scratch_gpt.training.lr_schedule import batch_size_at, learning_rate


def test_wsd_warms_up_stays_constant_and_decays_linearly_to_zero():
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=4, decay_fraction=0.5)
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:10] == [1.0] * 5
    assert np.diff(rates[10:]) == pytest.approx([-1 / 11] * 9)
    assert learning_rate(20, 20, settings) == 0.0


def test_wsd_follows_the_schedule_of_transformers():
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=10, decay_fraction=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    stock = get_wsd_schedule(
        optimizer,
        num_warmup_steps=10,
        num_decay_steps=50,
        num_training_steps=100,
        decay_type="linear",
        min_lr_ratio=0.0,
    )
    for step in range(100):
        # ours has no step with a rate of zero, so it is one step ahead in warm-up and decay
        assert learning_rate(step, 100, settings) == pytest.approx(stock.get_last_lr()[0], abs=0.1)
        optimizer.step()
        stock.step()


def test_cosine_ends_at_a_tenth_of_the_peak():
    settings = TrainingSettings(learning_rate=2.0, schedule="cosine", warmup_steps=0)
    assert learning_rate(0, 10, settings) == 2.0
    assert learning_rate(5, 10, settings) == pytest.approx(2.0 * 0.55)
    assert learning_rate(10, 10, settings) == pytest.approx(0.2)


def test_linear_constant_and_a_minimum():
    linear = TrainingSettings(learning_rate=1.0, schedule="linear", warmup_steps=2)
    rates = [learning_rate(step, 12, linear) for step in range(13)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *np.linspace(1, 0, 11)])
    with_minimum = TrainingSettings(learning_rate=2.0, schedule="linear", warmup_steps=0, min_lr_ratio=0.25)
    assert learning_rate(12, 12, with_minimum) == pytest.approx(0.5)
    constant = TrainingSettings(learning_rate=2.0, schedule="constant", warmup_steps=1)
    assert [learning_rate(step, 9, constant) for step in (0, 1, 5, 9)] == [1.0, 2.0, 2.0, 2.0]


def test_the_batch_grows_in_full_micro_batches():
    settings = TrainingSettings(batch_warmup_steps=7)
    sizes = [batch_size_at(step, 64, 8, settings) for step in range(10)]
    assert sizes == [8, 16, 24, 32, 40, 48, 56, 64, 64, 64]
    assert batch_size_at(0, 64, 8, TrainingSettings()) == 64
    assert [batch_size_at(step, 12, 4, TrainingSettings(batch_warmup_steps=2)) for step in range(4)] == [4, 8, 12, 12]
