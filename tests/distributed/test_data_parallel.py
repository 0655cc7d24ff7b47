"""Real processes under `accelerate launch`: two give the run of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_events, read_metrics
from tests.conftest import TINY_RUN
from tests.distributed.launch import finish

CONFIG = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp_cpu.yaml"


def launch(arguments, program=("-m", "scratch_gpt"), **environment):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIG),
        "--main_process_port",
        "0",
    ]
    return finish([*command, *program, *arguments], env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment})


def arguments(run_dir, corpus, steps):
    run = ["pretrain", "--run-dir", str(run_dir), "--corpus", str(corpus), "--max-steps", str(steps), *TINY_RUN]
    return [*run, "--training.save_every", "5", "--training.eval_every", "5"]


def test_two_processes_give_the_run_of_one_and_each_resumes_from_the_other(corpus, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    done = launch(arguments(two, corpus, 10), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "256 tokens per step on 2 process(es)" in done.stdout
    assert done.stdout.count("precision  ") == 1  # only the main process prints
    assert main(arguments(one, corpus, 10)) == 0

    def compare(steps):
        for key in ("loss", "grad_norm", "tokens", "validation_bits_per_byte"):
            values = [[r[key] for r in read_metrics(d / "metrics.jsonl") if key in r] for d in (one, two)]
            assert values[0] == pytest.approx(values[1], rel=2e-4), key
        assert len(read_metrics(two / "metrics.jsonl")) == steps
        weights = [load_file(d / "final" / "model.safetensors") for d in (one, two)]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)

    compare(10)
    # begun on two, resumed on one: the data order is that of the uninterrupted run
    assert main([*arguments(two, corpus, 15)]) == 0
    assert main([*arguments(one, corpus, 15)]) == 0
    compare(15)


OVERFLOW = """
import math, sys, torch
from scratch_gpt.cli import leave, main
from scratch_gpt.training import trainer
from scratch_gpt.training.loss_scaler import LossScaler

def forward_backward(self, data, original=trainer.Trainer.forward_backward):
    weight = self.strategy.unwrap(self.model).lm_head.weight
    last = self.strategy.rank == self.strategy.world_size - 1
    if not last or data.cursor.row // 8 != 3:
        return original(self, data)
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    loss = original(self, data)
    hook.remove()
    return loss

trainer.Trainer.forward_backward = forward_backward
trainer.LossScaler = lambda _, **state: LossScaler(True, **state)
leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_the_step_on_all(corpus, tmp_path):
    script = tmp_path / "overflow.py"
    script.write_text(OVERFLOW)
    run = arguments(tmp_path / "two", corpus, 6)
    done = launch(run, [str(script)], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    run = arguments(tmp_path / "one", corpus, 6)
    alone = subprocess.run([sys.executable, script, *run], capture_output=True, text=True, check=False, timeout=240)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    losses = []
    for name in ("one", "two"):
        metrics = tmp_path / name / "metrics.jsonl"
        assert [(event["event"], event["step"]) for event in read_events(metrics)] == [("overflow", 3)]
        losses.append([record["loss"] for record in read_metrics(metrics)])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_independent_copies_are_refused(corpus, tmp_path):
    done = launch(arguments(tmp_path / "run", corpus, 2), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert "each would train a copy of its own" in done.stderr
