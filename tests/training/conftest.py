"""Fixtures of the training tests."""

import pytest

from scratch_gpt.training import pretrain
from scratch_gpt.training.trainer import TrainerCallback
from tests.training.runs import SEQUENCES_PER_STEP


@pytest.fixture
def callbacks(monkeypatch):
    """A list: the trainer callbacks of every `scratch-gpt pretrain` of this test."""
    active = []
    monkeypatch.setattr(pretrain, "pretrain_command", lambda settings: pretrain.pretrain(settings, active))
    return active


class Poison(TrainerCallback):
    """Spoils the data of some steps, and multiplies their loss and gradients."""

    def __init__(self, factors):
        self.factors = factors

    def factor(self, data):
        """By the step that reads this data in an uninterrupted run; None: leave it alone."""
        return self.factors.get(data.cursor.row // SEQUENCES_PER_STEP)

    def on_step_begin(self, trainer, data):
        if self.factor(data) is not None:
            for batch in data.batches:
                batch.targets[:] = 5  # the same token everywhere

    def on_loss(self, trainer, data, loss):
        factor = self.factor(data)
        if factor is None:
            return loss
        for parameter in trainer.model.parameters():
            parameter.grad.mul_(factor)
        return loss * factor


@pytest.fixture
def poison(callbacks):
    """``poison({step: factor})``: spoil the data that an uninterrupted run reads at these steps (see :class:`Poison`)."""

    def install(factors):
        callbacks[:] = [Poison(factors)]

    return install
