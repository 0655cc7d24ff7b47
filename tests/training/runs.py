"""Tiny runs of `scratch-gpt pretrain`, and what to compare between them."""

import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from scratch_gpt.training.metrics import read_metrics
from tests.conftest import TINY_RUN

STEPS = 12
SEQUENCES_PER_STEP = 8


def arguments(run_dir, corpus, *more):
    """The command line of a run of :data:`STEPS` steps with dropout."""
    cadence = ["--training.eval_every", "6", "--training.save_every", "4", "--training.keep_last", "2"]
    run = ["pretrain", "--run-dir", str(run_dir), "--corpus", str(corpus), "--max-steps", str(STEPS)]
    return [*run, *TINY_RUN, *cadence, "--model.overrides.hidden_dropout", "0.1", *more]


def start(run_dir, corpus, *more):
    """The same in a process of its own, not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "scratch_gpt", *arguments(run_dir, corpus, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, run_dir, step):
    while len(read_metrics(run_dir / "metrics.jsonl")) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def losses(run_dir):
    return {record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    """Same losses and the same final weights, bit for bit."""
    assert losses(one) == losses(other)
    first, second = weights(one / "final"), weights(other / "final")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
