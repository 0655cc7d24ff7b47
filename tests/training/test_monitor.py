"""Samples, benchmarks and the profiler do not change a bit of the training."""

import gzip
import json
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import yaml

from scratch_gpt.cli import main
from scratch_gpt.training.checkpoint import find_checkpoint
from scratch_gpt.training.metrics import read_events, read_metrics
from scratch_gpt.training.monitor import evaluation_mode
from tests.training import runs
from tests.training.runs import assert_same_run

SAMPLES = ["--training.sample_every", "3", "--training.sample_prompts", '["It was", "She"]']
BENCHMARK = ["--training.benchmark_every", "5", "--training.benchmark_limit", "10"]
LONGER = ["--model.max_position_embeddings", "128", "--training.context_length", "32"]  # full sentences fit


def arguments(run_dir, corpus, *more):
    return runs.arguments(run_dir, corpus, *LONGER, *more)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A run without samples and benchmarks."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert main(arguments(run_dir, corpus)) == 0
    return run_dir


def read_samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_samples_change_no_bit_of_the_training(plain, corpus, tmp_path, capsys):
    assert main([*arguments(tmp_path / "run", corpus), *SAMPLES]) == 0
    assert_same_run(tmp_path / "run", plain)
    written = read_samples(tmp_path / "run")
    assert [one["step"] for one in written] == [3, 6, 9, 12]
    for one in written:
        first, second = one["samples"]
        assert first.startswith("It was") and second.startswith("She")
    assert "  step     3  > It was" in capsys.readouterr().out
    assert not read_events(tmp_path / "run" / "metrics.jsonl")


def test_samples_start_a_document_by_default_and_a_resumed_run_writes_the_same(corpus, tmp_path):
    uninterrupted, stopped = (
        [*arguments(tmp_path / name, corpus), "--training.sample_every", "4"] for name in ("uninterrupted", "stopped")
    )
    assert main(uninterrupted) == 0
    assert main([*stopped, "--max-hours", "1e-9"]) == 75
    assert main(stopped) == 0
    assert read_samples(tmp_path / "stopped") == read_samples(tmp_path / "uninterrupted")
    assert all(len(one["samples"]) == 1 for one in read_samples(tmp_path / "uninterrupted"))


def test_benchmarks_are_written_to_the_metrics_and_change_no_bit(plain, corpus, tmp_path, capsys):
    assert main([*arguments(tmp_path / "run", corpus), *BENCHMARK]) == 0
    assert_same_run(tmp_path / "run", plain)
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    assert [(one["event"], one["step"]) for one in events] == [("benchmark", 5), ("benchmark", 10), ("benchmark", 12)]
    for event in events:
        assert event["scores"].keys() == {"next_sentence", "word_order"}
        assert 0 <= event["scores"]["word_order"]["acc"] <= 1 and event["scores"]["word_order"]["acc_stderr"] >= 0
    assert "word_order: acc" in capsys.readouterr().out


def write_task(folder):
    """Write a task for the harness, with each of its two choices correct for every other question."""
    folder.mkdir()
    questions = [{"context": "It", "choices": ["was", "saw"], "answer": number % 2} for number in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {"task": "was_or_saw", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}, "doc_to_text": "{{context}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (folder / "was_or_saw.yaml").write_text(yaml.safe_dump(task))
    return ["--training.benchmark_path", str(folder), "--training.benchmark_tasks", "[was_or_saw]"]


def test_a_task_of_the_harness_runs_by_its_name(corpus, tmp_path):
    task = write_task(tmp_path / "tasks")
    assert main([*arguments(tmp_path / "run", corpus), *BENCHMARK, *task, "--max-steps", "5"]) == 0
    [event] = read_events(tmp_path / "run" / "metrics.jsonl")
    assert event["scores"]["was_or_saw"]["acc"] == 0.5


def test_a_benchmark_that_fails_is_an_event_and_training_continues(plain, corpus, tmp_path, monkeypatch, capsys):
    def fail(*_):
        assert find_checkpoint(tmp_path / "run")[0].name == f"checkpoint-{failed_at.pop(0)}"
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("no such disk")

    failed_at = [5, 10, 12]
    monkeypatch.setattr("scratch_gpt.evaluation.lm_eval.run_tasks", fail)
    assert main([*arguments(tmp_path / "run", corpus), *BENCHMARK]) == 0
    assert not failed_at
    assert_same_run(tmp_path / "run", plain)
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    assert [one["event"] for one in events] == ["benchmark failed"] * 3
    assert events[0]["reason"] == "RuntimeError: no such disk" and "training continues" in capsys.readouterr().out


def test_a_benchmark_that_kills_the_process_loses_nothing(plain, corpus, tmp_path, monkeypatch, capsys):
    program = """
        import os, signal, sys
        from scratch_gpt.evaluation import lm_eval
        lm_eval.run_tasks = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        from scratch_gpt.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    run = [*arguments(tmp_path / "run", corpus), *BENCHMARK]
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program), *run], check=False).returncode == -9
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5
    monkeypatch.setattr("scratch_gpt.evaluation.lm_eval.run_tasks", lambda *_: [])
    assert main(run) == 0
    assert "resumed    checkpoint-5" in capsys.readouterr().out
    # the benchmark that killed the process is not tried again: it would end each restart
    assert [event["step"] for event in read_events(tmp_path / "run" / "metrics.jsonl")] == [10, 12]
    assert_same_run(tmp_path / "run", plain)


@pytest.mark.slow  # lists the thousands of tasks that the harness has
def test_an_unknown_task_is_refused_at_once(corpus, tmp_path, capsys):
    run = [*arguments(tmp_path / "run", corpus), *BENCHMARK, "--training.benchmark_tasks", "[hellaswag, hellawag]"]
    assert main(run) == 2
    assert "there is no task hellawag in the harness; --training.benchmark_path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_benchmarks_without_text_need_the_name_of_a_task(corpus, tmp_path, capsys):
    run = [*arguments(tmp_path / "run", corpus), *BENCHMARK, "--data-path", "x", "--tokenizer-path", "y"]
    assert main(run) == 2
    assert "name --training.benchmark_tasks" in capsys.readouterr().err


def test_evaluation_mode_restores_mode_and_random_numbers():
    model = torch.nn.Dropout(0.5)
    numbers = []
    for evaluate in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        if evaluate:
            with evaluation_mode(model):
                assert not model.training and not torch.is_grad_enabled()
                torch.manual_seed(7), random.seed(7), np.random.seed(7)
        numbers.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert numbers[0] == numbers[1] and model.training and torch.is_grad_enabled()


def test_the_profiler_records_its_steps_and_no_others(plain, corpus, tmp_path, capsys):
    assert main([*arguments(tmp_path / "run", corpus), "--training.profile_steps", "[4, 6]"]) == 0
    assert_same_run(tmp_path / "run", plain)
    trace = tmp_path / "run" / "profile" / "steps-4-6-process-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    # one fused AdamW call for each of the groups, in each of three steps
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 3
    printed = capsys.readouterr().out
    assert "Self CPU %" in printed and "aten::" in printed and str(trace) in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--training.profile_steps", "[5]"], r"give the first and the last step, such as [10, 13]"),
        (["--training.profile_steps", "[5, 4]"], r"give the first and the last step"),
        (["--training.memory_snapshot_step", "3"], "needs a CUDA GPU, and this run is on cpu"),
        (
            ["--training.sample_every", "2", "--parallel.pipeline", "2"],
            "in a pipeline each process has some blocks only",
        ),
        (["--training.sample_every", "0"], "--training.sample_every is 0; it must be more than 0"),
    ],
)
def test_monitoring_that_cannot_work_is_refused(more, message, corpus, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", corpus, *more)) == 2
    assert message in capsys.readouterr().err
