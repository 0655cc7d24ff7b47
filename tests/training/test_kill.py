"""A run that is killed or meets a full disk, anywhere and any number of times, ends like an uninterrupted one."""

import errno
import math
import random
import shutil
import signal
import time

import pytest

from scratch_gpt.cli import EXIT_STOPPED, EXIT_USER_ERROR, main
from scratch_gpt.training import checkpoint
from scratch_gpt.training.checkpoint import find_checkpoint
from scratch_gpt.training.metrics import read_events, read_metrics
from scratch_gpt.training.run_directory import stored_settings
from scratch_gpt.training.trainer import TrainerCallback
from tests.training.faults import KILLED, Faults, call, command
from tests.training.runs import SEQUENCES_PER_STEP, STEPS, arguments, assert_same_run, start

EXACT = ("loss", "grad_norm", "learning_rate", "tokens", "validation_loss", "validation_bits_per_byte")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """(run directory, number of file operations) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, operations = call(command, arguments(folder / "run", corpus), folder / "output")
    assert code == 0, (folder / "output").read_text()
    return folder / "run", operations


def assert_same_as_uninterrupted(run_dir, uninterrupted):
    assert_same_run(run_dir, uninterrupted[0])
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, uninterrupted[0]))
    assert [record["step"] for record in mine] == list(range(1, STEPS + 1))
    for one, other in zip(mine, theirs, strict=True):
        assert {key: one.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors", "trainer_state/rng.safetensors"):
        one, other = (folder / f"checkpoint-{STEPS}" / name for folder in (run_dir, uninterrupted[0]))
        assert one.read_bytes() == other.read_bytes()


def some_kill(rng, operations):
    """A fault in one of the first steps of a process, or at one of its first file operations, most of which belong to saves."""
    if rng.random() < 0.4:
        return Faults(kill_in_step=rng.randrange(1, 7))
    return Faults(kill_at=rng.randrange(operations // 5, operations // 2))


@pytest.mark.parametrize(("async_save", "seed"), [("off", 1), ("on", 2)])
def test_a_run_killed_at_random_resumes_bit_for_bit(async_save, seed, uninterrupted, corpus, tmp_path):
    run, output = arguments(tmp_path / "run", corpus, "--training.async_save", async_save), tmp_path / "output"
    rng, kills = random.Random(seed), []
    for _ in range(5):
        faults = some_kill(rng, uninterrupted[1])
        code, _ = call(command, run, output, faults=faults)
        assert code in (0, KILLED), output.read_text()
        if code == KILLED:
            kills.append(faults)
    assert len(kills) > 2, kills
    code, _ = call(command, run, output)
    assert code == 0, output.read_text()
    assert_same_as_uninterrupted(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", ["off", "on"])
def test_a_run_killed_at_twenty_random_times_resumes_bit_for_bit(async_save, uninterrupted, corpus, tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    rng, run_dir, kills = random.Random(seed), tmp_path / "run", 0
    while kills < 20:
        before = written(run_dir / "metrics.jsonl")
        process = start(run_dir, corpus, "--training.async_save", async_save)
        while (
            process.poll() is None and written(run_dir / "metrics.jsonl") == before
        ):  # it is written when a run starts
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in (0, KILLED), output
        if process.returncode == 0:
            assert_same_as_uninterrupted(run_dir, uninterrupted)
            for path in (*run_dir.glob("checkpoint-*"), run_dir / "final"):
                path.rename(tmp_path / f"{path.name}-{kills}")  # start once more
        kills += process.returncode == KILLED


def written(file):
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize(("async_save", "seed"), [("off", 1), ("on", 2)])
def test_a_run_that_fills_the_disk_reports_it_and_resumes_when_there_is_space(
    async_save, seed, uninterrupted, corpus, tmp_path
):
    run, output = arguments(tmp_path / "run", corpus, "--training.async_save", async_save), tmp_path / "output"
    rng = random.Random(seed)
    full_from = rng.randrange(uninterrupted[1] // 3, uninterrupted[1])
    for kill_at in (full_from + rng.randrange(1, 6), 10**9):
        code, _ = call(command, run, output, faults=Faults(full_from=full_from, kill_at=kill_at))
        assert code in (KILLED, EXIT_USER_ERROR), output.read_text()
        assert code == KILLED or "No space left on device" in output.read_text()
        assert "Traceback" not in output.read_text()
    assert find_checkpoint(tmp_path / "run")[0] is not None
    code, _ = call(command, run, output)
    assert code == 0, output.read_text()
    assert "resumed" in output.read_text()
    assert_same_as_uninterrupted(tmp_path / "run", uninterrupted)


def test_partial_files_of_a_killed_process_are_removed(corpus, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / ".checkpoint-7.partial").mkdir(parents=True)
    (run_dir / ".checkpoint-7.partial" / "model.safetensors").write_bytes(b"half")
    (run_dir / ".config.yaml.partial").write_text("run_d")
    assert main([*arguments(run_dir, corpus), "--max-steps", "1"]) == 0
    assert not list(run_dir.glob(".*.partial"))


def test_a_longer_run_killed_at_its_start_does_not_count_as_finished(uninterrupted, corpus, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    longer = [*arguments(tmp_path / "run", corpus), "--max-steps", "14"]

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("record_settings", "prepare_tokenizer"):  # before and after the settings are recorded
        monkeypatch.setattr(f"scratch_gpt.training.pretrain.{name}", interrupt)
        assert main(longer) == EXIT_STOPPED
        monkeypatch.undo()
    assert main(longer) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 14


def test_a_dry_run_does_not_change_the_run(uninterrupted, corpus, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    longer = [*arguments(tmp_path / "run", corpus), "--max-steps", "14"]
    assert main([*longer, "--dry-run"]) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert stored_settings(tmp_path / "run")["max_steps"] == STEPS
    assert main(longer) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 14


def slow_save(monkeypatch, error=None):
    """Make saving take longer than several steps, and end with ``error``."""

    def save(tensors, file, original=checkpoint.save_file):
        time.sleep(0.2)
        if error is not None:
            raise error
        original(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save)


IN_BACKGROUND = ["--training.async_save", "on"]


def test_a_stop_waits_for_the_background_save(corpus, tmp_path, monkeypatch, capsys):
    slow_save(monkeypatch)
    run = arguments(tmp_path / "run", corpus, *IN_BACKGROUND)
    assert main([*run, "--max-hours", "1e-9"]) == EXIT_STOPPED
    assert find_checkpoint(tmp_path / "run")[0].name == "checkpoint-1"
    slow_save(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert main([*run, "--max-hours", "1e-9"]) == EXIT_USER_ERROR
    assert "No space left on device" in capsys.readouterr().err
    assert find_checkpoint(tmp_path / "run")[0].name == "checkpoint-1"


def test_a_failed_background_save_ends_the_run_before_the_next_save(callbacks, corpus, tmp_path, monkeypatch):
    slow_save(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))

    class SlowStep(TrainerCallback):
        def on_step_begin(self, trainer, data):
            time.sleep(0.3)

    callbacks.append(SlowStep())
    run = arguments(tmp_path / "run", corpus, *IN_BACKGROUND)
    assert main(run) == EXIT_USER_ERROR  # saves at step 4, and would at step 8
    assert max(record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")) < 7


def test_a_rollback_waits_for_the_background_save(callbacks, corpus, tmp_path, monkeypatch):
    slow_save(monkeypatch)

    class NanLoss(TrainerCallback):
        def on_loss(self, trainer, data, loss):
            return loss * (math.nan if 9 <= data.cursor.row // SEQUENCES_PER_STEP <= 10 else 1.0)

    callbacks.append(NanLoss())
    guard = ["--guard.max_skips", "2"]
    for mode in ("on", "off"):
        assert main(arguments(tmp_path / mode, corpus, "--training.async_save", mode, *guard)) == 0
        events = read_events(tmp_path / mode / "metrics.jsonl")
        assert [event["event"] for event in events] == ["skipped", "skipped", "rolled back"]
        assert "to checkpoint-8" in events[-1]["reason"]
    assert_same_run(tmp_path / "on", tmp_path / "off")
