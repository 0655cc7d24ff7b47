"""Loss scaling for float16, tried on CPU: the scale is put into runs in float32, and into runs under float16 autocast."""

import json
import math
import random

import pytest
import torch

from scratch_gpt.cli import main
from scratch_gpt.training import loss_scaler as loss_scale
from scratch_gpt.training import trainer as loop
from scratch_gpt.training.loss_scaler import LossScaler
from scratch_gpt.training.metrics import read_events
from scratch_gpt.training.trainer import Trainer
from tests.training.test_runs import STEPS, arguments, assert_same_run, losses

ROWS_PER_STEP = 8


@pytest.fixture
def scaled(monkeypatch):
    """``scaled(scale)``: runs begin with this loss scale, whatever their precision."""

    def begin(scale=2.0**16):
        monkeypatch.setattr(loop, "LossScaler", lambda _, **state: LossScaler(True, **({"scale": scale} | state)))

    return begin


@pytest.fixture
def overflow(monkeypatch):
    """``overflow({step: scale})``: the gradients of the data that is read at this step fit up to this scale only."""

    def limit(limits):
        original = Trainer.forward_backward

        def forward_backward(self, data):
            loss = original(self, data)
            if self.loss_scaler.scale > limits.get(data.cursor.row // ROWS_PER_STEP, math.inf):
                next(self.model.parameters()).grad[0, 0] = math.inf
            return loss

        monkeypatch.setattr(Trainer, "forward_backward", forward_backward)

    return limit


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A run without a loss scale."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert main(arguments(run_dir, corpus)) == 0
    return run_dir


def events(run_dir):
    return [(event["event"], event["step"]) for event in read_events(run_dir / "metrics.jsonl")]


def state_of(run_dir, step=STEPS):
    return json.loads((run_dir / f"checkpoint-{step}" / "trainer_state" / "state.json").read_text())


def test_the_scale_takes_the_course_of_torchs_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
    ours = LossScaler(True)
    scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    draw = random.Random(0)
    for _ in range(200):
        finite = draw.random() < 0.85
        scaler.scale(parameter.sum() * (1.0 if finite else math.inf)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (ours.overflow(1.0, 1.0 if finite else math.inf) is None) == finite
        theirs = scaler.state_dict()
        assert ours.state() == {"scale": theirs["scale"], "good_steps": theirs["_growth_tracker"]}


def test_a_power_of_two_changes_no_bit(scaled, plain, corpus, tmp_path):
    scaled()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert_same_run(tmp_path / "run", plain)
    assert not events(tmp_path / "run")
    assert state_of(tmp_path / "run")["loss_scale"] == {"scale": 2.0**16, "good_steps": STEPS}
    assert state_of(plain)["loss_scale"] == {}


def test_an_overflow_halves_the_scale_and_leaves_the_weights_alone(scaled, overflow, corpus, tmp_path, capsys):
    overflow({3: 0.0, 7: 0.0})
    assert main(arguments(tmp_path / "skipped", corpus)) == 0  # by the guard, which is known to leave the weights alone
    assert events(tmp_path / "skipped") == [("skipped", 3), ("skipped", 6)]
    scaled()
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert "overflow: the gradient norm is inf, the loss scale is now 32768" in capsys.readouterr().out
    assert events(tmp_path / "run") == [("overflow", 3), ("overflow", 6)]
    assert_same_run(tmp_path / "run", tmp_path / "skipped")
    state = state_of(tmp_path / "run")
    assert state["loss_scale"] == {"scale": 2.0**14, "good_steps": STEPS - 5}
    assert state["guard"]["skipped"] == 0


def test_what_a_smaller_scale_does_not_mend_is_left_to_the_guard(scaled, overflow, corpus, tmp_path):
    scaled(64.0)
    overflow({step: 0.0 for step in range(3, 11)})
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert events(tmp_path / "run") == [("overflow", 3)] * 6 + [("skipped", 3)] * 2
    assert state_of(tmp_path / "run")["loss_scale"]["scale"] == 1.0


def test_a_loss_that_is_not_finite_is_no_overflow():
    ours = LossScaler(True)
    assert ours.overflow(math.nan, math.nan) is None and ours.scale == 2.0**16


def test_a_crashed_run_goes_on_with_the_same_scale_and_losses(scaled, overflow, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scaled()
    overflow({2: 2.0**15, 6: 2.0**14, 9: 0.0})
    assert main(arguments(tmp_path / "whole", corpus)) == 0
    original = Trainer._finish_record

    def crash(self, left):
        original(self, left)
        if self.state.step == 6:  # saved at 4
            raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(Trainer, "_finish_record", crash)
        main(arguments(tmp_path / "parts", corpus))
    assert main(arguments(tmp_path / "parts", corpus)) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert events(tmp_path / "parts") == events(tmp_path / "whole") != []
    assert state_of(tmp_path / "parts")["loss_scale"] == state_of(tmp_path / "whole")["loss_scale"]


def test_a_run_in_float16_finds_its_scale_and_learns_as_in_float32(scaled, plain, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("scratch_gpt.distributed.strategy.autocast", lambda *how: torch.autocast("cpu", torch.float16))
    scaled()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=0.01)
    assert losses(tmp_path / "run") != losses(plain)
    scaled(2.0**28)  # far too large: now real gradients overflow
    assert main(arguments(tmp_path / "high", corpus)) == 0
    assert {event for event, _ in events(tmp_path / "high")} == {"overflow"}
    assert list(losses(tmp_path / "high")) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "high")[STEPS] == pytest.approx(losses(plain)[STEPS], abs=0.3)
