"""Tests that take minutes: `make test-slow`."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from scratch_gpt.data.sources import bundled_corpus
from scratch_gpt.training.metrics import read_events, read_metrics
from tests.conftest import TINY_RUN

pytestmark = pytest.mark.slow

# These runs use all cores; the fast tests use one thread.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def scratch_gpt(*arguments):
    return [sys.executable, "-m", "scratch_gpt", *map(str, arguments)]


def test_quickstart_learns_readable_english_in_its_time(tmp_path):
    run_dir = tmp_path / "run"
    command = scratch_gpt("quickstart", "--run-dir", run_dir, "--minutes", 2)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    print(f"{time.perf_counter() - start:.0f} s, {results['bits_per_byte']:.3f} bits per byte")
    assert not read_events(run_dir / "metrics.jsonl")  # the default recipe has no loss spikes
    assert results["bits_per_byte"] < 1.9  # 2.9 at the first step; 1.6 is usual
    known = set(re.findall(r"[a-z]+", bundled_corpus("train").read_text().lower()))
    words = re.findall(r"[a-z]+", " ".join(results["samples"]).lower())
    assert sum(word in known for word in words) > 0.9 * len(words)
    assert next(s for s in results["scores"] if s["task"] == "word_order")["value"] > 0.8


def test_compiled_blocks_train_like_eager_ones_and_resume_bit_for_bit(corpus, tmp_path):
    def arguments(name, compiled):
        run = ["pretrain", "--run-dir", tmp_path / name, "--corpus", corpus, "--max-steps", 12, *TINY_RUN]
        return scratch_gpt(*run, "--training.save_every", 4, "--training.compile", compiled)

    def losses(name):
        return [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]

    for name, compiled in (("eager", "off"), ("compiled", "on")):
        done = subprocess.run(arguments(name, compiled), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("compiled" if compiled == "on" else "eager") in done.stdout
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4)

    process = subprocess.Popen(arguments("killed", "on"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) < 6:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(arguments("killed", "on"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses("killed") == losses("compiled")
