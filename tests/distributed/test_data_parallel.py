"""Real processes under `accelerate launch`: the same run on two as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_metrics
from tests.conftest import TINY_RUN

CONFIG = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp_cpu.yaml"


def launch(arguments, **environment):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIG),
        "--main_process_port",
        "0",
    ]
    return subprocess.run(
        [*command, "-m", "scratch_gpt", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, **environment},
    )


def arguments(run_dir, corpus, steps):
    run = ["pretrain", "--run-dir", str(run_dir), "--corpus", str(corpus), "--max-steps", str(steps), *TINY_RUN]
    return [*run, "--training.save_every", "5", "--training.eval_every", "5"]


def test_two_processes_give_the_run_of_one_and_each_goes_on_with_the_other(corpus, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    done = launch(arguments(two, corpus, 10), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "256 tokens a step on 2 process(es)" in done.stdout
    assert done.stdout.count("arithmetic") == 1  # the second process keeps quiet
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
    # begun on two, continued on one; the order of the data is that of the uninterrupted run
    assert main([*arguments(two, corpus, 15)]) == 0
    assert main([*arguments(one, corpus, 15)]) == 0
    compare(15)


def test_independent_copies_are_refused(corpus, tmp_path):
    done = launch(arguments(tmp_path / "run", corpus, 2), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert "each would train a copy of its own" in done.stderr
