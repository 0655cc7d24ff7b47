"""What experiment trackers receive from a run, and that a failing tracker never ends it."""

import json
import math
import sqlite3
from typing import ClassVar

import accelerate.tracking
import pytest

from scratch_gpt.cli import main
from scratch_gpt.training import trackers
from scratch_gpt.training.metrics import read_events, read_metrics
from tests.training.runs import STEPS, arguments, losses

SECRET = "hf_abcdefghijklmnop"


@pytest.fixture
def fake(monkeypatch):
    """A tracker that records its calls; ``Fake.fail`` names the call that raises."""

    class Fake(accelerate.tracking.GeneralTracker):
        name = "fake"
        requires_logging_directory = False
        fail: str | None = None
        calls: ClassVar[list[tuple]] = []

        def __init__(self, project, **options):
            super().__init__()
            self.project = project

        @property
        def tracker(self):
            return self

        def record(self, call, *details):
            Fake.calls.append((call, *details))
            if Fake.fail == call:
                raise ConnectionError("the server is gone")

        def start(self):
            self.record("start")

        def store_init_configuration(self, values):
            self.record("config", values)

        def log(self, values, step=None, **kwargs):
            self.record("log", step, values)

        def finish(self):
            self.record("finish")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(trackers, "resolve_trackers", lambda trackers: ["fake"])
    return Fake


def test_a_tracker_receives_the_records_of_metrics_jsonl(fake, corpus, tmp_path):
    assert main(arguments(tmp_path / "run", corpus, "--training.log_every", "5")) == 0
    logged = {step: values for call, step, values in (one for one in fake.calls if one[0] == "log")}
    records = {record["step"]: record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert list(logged) == list(records) == [5, 6, 10, 12]
    for step, values in logged.items():
        assert all(isinstance(value, int | float) for value in values.values())
        assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu"} <= values.keys()
        assert values["loss"] == records[step]["loss"]
        assert values["epochs/corpus"] == records[step]["epochs"]["corpus"]
        assert ("validation_bits_per_byte" in values) == (step in (6, 12))
    assert fake.calls[0] == ("start",) and fake.calls[-1] == ("finish",)


def test_a_tracker_receives_settings_but_no_paths_and_no_secrets(fake, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder = tmp_path / SECRET
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(corpus.read_text())
    assert main([*arguments(folder / "run", text), "--training.benchmark_path", str(folder), "--max-steps", "1"]) == 0
    [config] = [one[1] for one in fake.calls if one[0] == "config"]
    assert config["training.total_batch_size"] == 256 and config["model.hidden_size"] == 32 and config["seed"] == 1337
    assert all(isinstance(value, str | int | float | bool | None) for value in config.values())
    assert SECRET not in json.dumps(fake.calls) and str(tmp_path) not in json.dumps(fake.calls)


def test_a_tracker_receives_events(fake, poison, corpus, tmp_path):
    poison({5: math.nan})
    assert main(arguments(tmp_path / "run", corpus)) == 0
    events = [
        (step, values) for call, step, values in (one for one in fake.calls if one[0] == "log") if "event" in values
    ]
    assert events == [(5, {"event": "skipped: the loss is nan"})]
    assert len(read_events(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("call", ["start", "config", "log", "finish"])
def test_a_failing_tracker_is_disabled_with_one_message(call, fake, corpus, tmp_path, capsys):
    fake.fail = call
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert capsys.readouterr().out.count("fake failed and is disabled (ConnectionError: the server is gone)") == 1
    assert [one[0] for one in fake.calls].count(call) == 1


def test_unknown_and_missing_trackers_are_refused_with_a_fix(corpus, tmp_path, capsys, monkeypatch):
    run = [*arguments(tmp_path / "run", corpus), "--training.trackers"]
    assert main([*run, "[mlflow]"]) == 2
    assert "unknown tracker 'mlflow'; choose from trackio, tensorboard, wandb" in capsys.readouterr().err
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert main([*run, "[wandb]"]) == 2
    assert "wandb is not installed; install it with pip install 'scratch-gpt[wandb]'" in capsys.readouterr().err
    assert trackers.resolve_trackers("auto") == []
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name == "trackio")
    assert trackers.resolve_trackers("auto") == ["trackio"]


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_resumed_run_continues_its_tensorboard_curves(corpus, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    run = [*arguments(tmp_path / "run", corpus), "--training.trackers", "[tensorboard]"]
    assert main([*run, "--max-steps", "5"]) == 0
    assert main(run) == 0
    logged = scalars(tmp_path / "run" / "tensorboard" / "scratch-gpt", "loss")
    assert logged == pytest.approx(losses(tmp_path / "run"))


def test_a_resumed_run_continues_its_trackio_curves_on_this_machine(corpus, tmp_path, scratch_gpt):
    pytest.importorskip("trackio", reason="pip install trackio")
    run = [*arguments(tmp_path / "run", corpus), "--training.trackers", "auto"]
    for steps in ("5", "12"):
        done = scratch_gpt(*run, "--max-steps", steps, TRACKIO_DIR=str(tmp_path / "trackio"))
        assert done.returncode == 0, done.stderr
    name = json.loads((tmp_path / "run" / "tracker_run.json").read_text())["run"]
    with sqlite3.connect(tmp_path / "trackio" / "scratch-gpt.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [name]).fetchall()
    assert {step: json.loads(text)["loss"] for step, text in rows} == pytest.approx(losses(tmp_path / "run"))


def test_wandb_records_a_run_offline_without_secrets_or_paths(corpus, tmp_path, scratch_gpt):
    pytest.importorskip("wandb", reason="pip install wandb")
    run = [*arguments(tmp_path / "run", corpus), "--training.trackers", "[wandb]"]
    done = scratch_gpt(*run, WANDB_MODE="offline", HF_TOKEN=SECRET)
    assert done.returncode == 0 and "failed and is disabled" not in done.stdout, done.stdout + done.stderr
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"grad_norm" in written and b"total_batch_size" in written
    assert SECRET.encode() not in written and str(tmp_path).encode() not in written
