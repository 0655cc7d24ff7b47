"""Loss scaling for float16, tested on CPU: in float32 runs with a loss scale, and under float16 autocast."""

import json
import math
import random

import pytest
import torch

from scratch_gpt.cli import main
from scratch_gpt.training import loss_scaler
from scratch_gpt.training.loss_scaler import LossScaler
from scratch_gpt.training.metrics import read_events
from scratch_gpt.training.trainer import TrainerCallback
from tests.training.runs import SEQUENCES_PER_STEP, STEPS, arguments, assert_same_run, losses


class InitialScale(TrainerCallback):
    """Enables loss scaling, whatever the precision; a resumed run keeps its scale."""

    def __init__(self, scale):
        self.scale = scale

    def on_train_begin(self, trainer):
        trainer.loss_scaler = LossScaler(True, **({"scale": self.scale} | trainer.state.loss_scale))


class Overflow(TrainerCallback):
    """Makes the gradients of a step's data overflow at any larger scale than its limit."""

    def __init__(self, limits):
        self.limits = limits

    def on_loss(self, trainer, data, loss):
        if trainer.loss_scaler.scale > self.limits.get(data.cursor.row // SEQUENCES_PER_STEP, math.inf):
            next(trainer.model.parameters()).grad[0, 0] = math.inf
        return loss


class CrashAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, record):
        if record["step"] == self.step:
            raise RuntimeError("crash")


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A run without loss scaling."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert main(arguments(run_dir, corpus)) == 0
    return run_dir


def events(run_dir):
    return [(event["event"], event["step"]) for event in read_events(run_dir / "metrics.jsonl")]


def state_of(run_dir, step=STEPS):
    return json.loads((run_dir / f"checkpoint-{step}" / "trainer_state" / "state.json").read_text())


def test_the_scale_changes_as_in_torchs_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 5)
    ours = LossScaler(True)
    scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    rng = random.Random(0)
    for _ in range(200):
        finite = rng.random() < 0.85
        scaler.scale(parameter.sum() * (1.0 if finite else math.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (ours.overflow(1.0, 1.0 if finite else math.inf) is None) == finite
        theirs = scaler.state_dict()
        assert ours.state() == {"scale": theirs["scale"], "good_steps": theirs["_growth_tracker"]}


def test_a_power_of_two_changes_no_bit(callbacks, plain, corpus, tmp_path):
    callbacks.append(InitialScale(2.0**16))
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert_same_run(tmp_path / "run", plain)
    assert not events(tmp_path / "run")
    assert state_of(tmp_path / "run")["loss_scale"] == {"scale": 2.0**16, "good_steps": STEPS}
    assert state_of(plain)["loss_scale"] == {}


def test_an_overflow_halves_the_scale_and_leaves_the_weights_alone(callbacks, corpus, tmp_path, capsys):
    callbacks.append(Overflow({3: 0.0, 7: 0.0}))
    assert main(arguments(tmp_path / "skipped", corpus)) == 0  # by the spike guard, which test_trainer.py tests
    assert events(tmp_path / "skipped") == [("skipped", 3), ("skipped", 6)]
    callbacks.append(InitialScale(2.0**16))
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert "overflow: the gradient norm is inf, the loss scale is now 32768" in capsys.readouterr().out
    assert events(tmp_path / "run") == [("overflow", 3), ("overflow", 6)]
    assert_same_run(tmp_path / "run", tmp_path / "skipped")
    state = state_of(tmp_path / "run")
    assert state["loss_scale"] == {"scale": 2.0**14, "good_steps": STEPS - 5}
    assert state["guard"]["skipped"] == 0


def test_an_overflow_at_the_smallest_scale_is_left_to_the_guard(callbacks, corpus, tmp_path):
    callbacks += [InitialScale(64.0), Overflow({step: 0.0 for step in range(3, 11)})]
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert events(tmp_path / "run") == [("overflow", 3)] * 6 + [("skipped", 3)] * 2
    assert state_of(tmp_path / "run")["loss_scale"]["scale"] == 1.0


def test_a_non_finite_loss_is_no_overflow():
    ours = LossScaler(True)
    assert ours.overflow(math.nan, math.nan) is None and ours.scale == 2.0**16


def test_a_crashed_run_resumes_with_the_same_scale_and_losses(callbacks, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scaler, "GROWTH_INTERVAL", 3)
    callbacks += [InitialScale(2.0**16), Overflow({2: 2.0**15, 6: 2.0**14, 9: 0.0})]
    assert main(arguments(tmp_path / "uninterrupted", corpus)) == 0
    callbacks.append(CrashAfter(6))  # saved at 4
    with pytest.raises(RuntimeError, match="crash"):
        main(arguments(tmp_path / "crashed", corpus))
    callbacks.pop()
    assert main(arguments(tmp_path / "crashed", corpus)) == 0
    assert_same_run(tmp_path / "crashed", tmp_path / "uninterrupted")
    assert events(tmp_path / "crashed") == events(tmp_path / "uninterrupted") != []
    assert state_of(tmp_path / "crashed")["loss_scale"] == state_of(tmp_path / "uninterrupted")["loss_scale"]


def test_a_run_in_float16_finds_its_scale_and_learns_as_in_float32(callbacks, plain, corpus, tmp_path, monkeypatch):
    float16 = torch.autocast("cpu", torch.float16)
    monkeypatch.setattr("scratch_gpt.distributed.strategy.autocast", lambda device, precision: float16)
    callbacks.append(InitialScale(2.0**16))
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=0.01)
    assert losses(tmp_path / "run") != losses(plain)
    callbacks[:] = [InitialScale(2.0**28)]  # far too large: now real gradients overflow
    assert main(arguments(tmp_path / "high", corpus)) == 0
    assert {event for event, _ in events(tmp_path / "high")} == {"overflow"}
    assert list(losses(tmp_path / "high")) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "high")[STEPS] == pytest.approx(losses(plain)[STEPS], abs=0.3)
