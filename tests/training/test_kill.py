"""A run that is killed or finds the disk full, wherever and as often as you like, ends as the run that was left alone."""

import random
import signal
import time

import pytest

from scratch_gpt.cli import EXIT_USER_ERROR
from scratch_gpt.training.checkpoint import find_checkpoint
from scratch_gpt.training.metrics import read_metrics
from tests.training.faults import KILLED, Faults, call, command
from tests.training.test_runs import STEPS, arguments, assert_same_run, start

EXACT = ("loss", "grad_norm", "learning_rate", "tokens", "validation_loss", "validation_bits_per_byte")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """(run directory, number of its operations on files) of a run that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, operations = call(command, arguments(folder / "run", corpus), folder / "output")
    assert code == 0, (folder / "output").read_text()
    return folder / "run", operations


def assert_as_if_undisturbed(run_dir, undisturbed):
    assert_same_run(run_dir, undisturbed[0])
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, undisturbed[0]))
    assert [record["step"] for record in mine] == list(range(1, STEPS + 1))
    for one, other in zip(mine, theirs, strict=True):
        assert {key: one.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors", "trainer_state/rng.safetensors"):
        one, other = (folder / f"checkpoint-{STEPS}" / name for folder in (run_dir, undisturbed[0]))
        assert one.read_bytes() == other.read_bytes()


def some_kill(draw, operations):
    """In one of the first steps of a process, or at one of its first operations on files: most belong to saves."""
    if draw.random() < 0.4:
        return Faults(kill_in_step=draw.randrange(1, 7))
    return Faults(kill_at=draw.randrange(operations // 5, operations // 2))


@pytest.mark.parametrize(("async_save", "seed"), [("off", 1), ("on", 2)])
def test_a_run_killed_at_random_goes_on_bit_for_bit(async_save, seed, undisturbed, corpus, tmp_path):
    run, output = arguments(tmp_path / "run", corpus, "--training.async_save", async_save), tmp_path / "output"
    draw, kills = random.Random(seed), []
    for _ in range(5):
        faults = some_kill(draw, undisturbed[1])
        code, _ = call(command, run, output, faults=faults)
        assert code in (0, KILLED), output.read_text()
        if code == KILLED:
            kills.append(faults)
    assert len(kills) > 2, kills
    code, _ = call(command, run, output)
    assert code == 0, output.read_text()
    assert_as_if_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", ["off", "on"])
def test_a_run_killed_at_twenty_random_times_goes_on_bit_for_bit(async_save, undisturbed, corpus, tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    draw, run_dir, kills = random.Random(seed), tmp_path / "run", 0
    while kills < 20:
        process = start(run_dir, corpus, "--training.async_save", async_save)
        while process.poll() is None and not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in (0, KILLED), output
        if process.returncode == 0:
            assert_as_if_undisturbed(run_dir, undisturbed)
            for path in (*run_dir.glob("checkpoint-*"), run_dir / "final"):
                path.rename(tmp_path / f"{path.name}-{kills}")  # begin once more
        kills += process.returncode == KILLED


@pytest.mark.parametrize(("async_save", "seed"), [("off", 1), ("on", 2), ("off", 3), ("on", 4)])
def test_a_run_that_fills_the_disk_says_so_and_goes_on_when_there_is_space(
    async_save, seed, undisturbed, corpus, tmp_path
):
    run, output = arguments(tmp_path / "run", corpus, "--training.async_save", async_save), tmp_path / "output"
    draw = random.Random(seed)
    full_from = draw.randrange(undisturbed[1] // 3, undisturbed[1])
    for kill_at in (full_from + draw.randrange(1, 6), 10**9):
        code, _ = call(command, run, output, faults=Faults(full_from=full_from, kill_at=kill_at))
        assert code in (KILLED, EXIT_USER_ERROR), output.read_text()
        assert code == KILLED or "No space left on device" in output.read_text()
        assert "Traceback" not in output.read_text()
    assert find_checkpoint(tmp_path / "run")[0] is not None
    code, _ = call(command, run, output)
    assert code == 0, output.read_text()
    assert "resumed" in output.read_text()
    assert_as_if_undisturbed(tmp_path / "run", undisturbed)
