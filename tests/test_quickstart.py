"""`scratch-gpt quickstart`, at a size for tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from scratch_gpt.cli import main
from scratch_gpt.data.sources import bundled_corpus, read_documents
from scratch_gpt.training.metrics import read_metrics
from tests.conftest import TINY_RUN


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A corpus large enough for questions from its held-out end, and a model that trains in seconds."""
    text = next(iter(read_documents([bundled_corpus("train")])))
    corpus = tmp_path_factory.mktemp("corpus") / "novel.txt"
    corpus.write_text(text, encoding="utf-8")
    size = ["--model.max_position_embeddings", "128", "--training.total_batch_size", "512"]
    return ["quickstart", "--corpus", str(corpus), *TINY_RUN, *size, "--max-steps", "8", "--training.save_every", "4"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "quickstart"
    command = [sys.executable, "-m", "scratch_gpt", *arguments, "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done.stdout


def test_every_section_prints_what_it_did(finished):
    run_dir, printed = finished
    for section in range(1, 7):
        assert f"[{section}/6]" in printed
    assert re.search(r"validation \d\.\d+ bits per byte .* tokens/s .* left", printed)
    assert printed.count("  > ") == 6  # three samples before training and three after
    assert "its logits are equal, bit for bit" in printed
    assert re.search(r"word_order \d+\.\d%", printed)
    assert f"generate --model {run_dir}/final" in printed


def test_results_card_and_metrics_agree(finished):
    run_dir, _ = finished
    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    card = (run_dir / "final" / "README.md").read_text()
    assert f"| bits per byte | {results['bits_per_byte']:.3f} |" in card
    records = read_metrics(run_dir / "metrics.jsonl")
    assert results["bits_per_byte"] == pytest.approx(records[-1]["validation_bits_per_byte"], rel=1e-4)
    assert results["tokens_seen"] == records[-1]["tokens"] == 8 * 512
    assert results["reload_difference"] == 0.0
    assert all(sample in card.replace("\n> ", "\n") for sample in results["samples"])
    assert "novel.txt" in card
    assert str(run_dir.parent) not in card


def test_the_benchmark_runs_from_the_command_line_of_the_harness(finished, tmp_path):
    run_dir, _ = finished
    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    model = f"pretrained={run_dir}/final,trust_remote_code=True,max_length=128,dtype=float32"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "word_order"]
        + ["--include_path", str(run_dir / "evaluation" / "tasks"), "--device", "cpu", "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = tmp_path.rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["word_order"]["acc,none"]
    ours = next(score["value"] for score in results["scores"] if score["task"] == "word_order")
    assert theirs == pytest.approx(ours)


def test_the_same_command_again_reports_that_it_is_finished(finished, arguments, capsys):
    run_dir, _ = finished
    before = (run_dir / "final" / "model.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "is finished; --fresh starts over" in printed
    assert "bits per byte on held-out text" in printed
    assert (run_dir / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_ctrl_c_while_training_saves_and_the_same_command_resumes(finished, arguments, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "scratch_gpt", *arguments, "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_metrics(run_dir / "metrics.jsonl")) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "The same command resumes" in printed
    assert main([*arguments, "--run-dir", str(run_dir)]) == 0
    uninterrupted, _ = finished
    assert [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(uninterrupted / "metrics.jsonl")
    ]


def test_fresh_starts_over(finished, arguments, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    assert main([*arguments, "--run-dir", str(run_dir), "--max-steps", "2", "--fresh"]) == 0
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    assert "[1/6]" in capsys.readouterr().out
