"""Saving checkpoints: killed or out of disk space at every file operation, in the foreground and in the background."""

import errno
import itertools
import json
import os
import random
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from scratch_gpt.cli import EXIT_USER_ERROR
from scratch_gpt.config import ModelSettings, TrainingSettings
from scratch_gpt.data.mixture import DataPosition
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.setup import build_strategy
from scratch_gpt.errors import UserError
from scratch_gpt.files import remove_partial
from scratch_gpt.model.loading import build_config
from scratch_gpt.training import checkpoint
from scratch_gpt.training.checkpoint import (
    Checkpointer,
    TrainingState,
    best_step,
    checkpoint_problem,
    find_checkpoint,
    read_state,
)
from tests.training.faults import KILLED, Faults, call

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
BITS_PER_BYTE = {2: 2.0, 4: 3.0, 6: 1.0, 8: 4.0}


def build_checkpointer(run_dir, tokenizer_folder, async_save="off"):
    """(checkpointer, model, optimizer) of a tiny run that keeps the newest and the best checkpoint."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer_folder)
    model = build_model(build_config(ModelSettings(preset="modern-30m", **SIZES), tokenizer), seed=0)
    optimizer = build_optimizer(model, TrainingSettings())
    settings = TrainingSettings(async_save=async_save, keep_last=1)
    return Checkpointer(build_strategy(), run_dir, model, tokenizer, settings), model, optimizer


def take_step(model, optimizer, step):
    """Take an optimizer step whose result depends only on ``step``."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def training_state(step):
    return TrainingState(
        step, 100 * step, "data", DataPosition(row=step), "fp32", False, guard={"losses": [1.0] * step}
    )


def save_steps(run_dir, tokenizer_folder, async_save, last):
    """Save every second step, and record its validation, like a run that resumes from the newest checkpoint.

    For simplicity, it repeats the steps before that checkpoint.
    """
    checkpointer, model, optimizer = build_checkpointer(run_dir, tokenizer_folder, async_save)
    run_dir.mkdir(exist_ok=True)
    remove_partial(run_dir)
    newest, _ = find_checkpoint(run_dir)
    done = 0 if newest is None else int(newest.name.split("-")[1])
    try:
        with checkpointer:
            for step in range(2, last + 1, 2):
                take_step(model, optimizer, step)
                if step > done:
                    checkpointer.save(optimizer, training_state(step))
                if step >= done:
                    checkpointer.record_best(step, BITS_PER_BYTE[step])
    except UserError as error:
        assert "No space left on device. Free some space" in str(error)
        return EXIT_USER_ERROR
    return 0


def files_in(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def saved(tokenizer_folder, tmp_path_factory):
    """``saved[step]``: a run directory after all saves up to ``step``."""
    folder = tmp_path_factory.mktemp("saved")
    for last in BITS_PER_BYTE:
        save_steps(folder / str(last), tokenizer_folder, "off", last)
    return {last: folder / str(last) for last in BITS_PER_BYTE}


def test_the_newest_and_the_best_checkpoints_are_kept(saved):
    kept = {last: sorted(path.name for path in folder.glob("*checkpoint-*")) for last, folder in saved.items()}
    assert kept == {
        2: ["checkpoint-2"],
        4: ["checkpoint-2", "checkpoint-4"],
        6: ["checkpoint-2", "checkpoint-6"],
        8: ["checkpoint-6", "checkpoint-8"],
    }


def test_the_files_of_a_background_save_are_the_same_bytes(saved, tokenizer_folder, tmp_path):
    save_steps(tmp_path, tokenizer_folder, "on", 8)
    assert files_in(tmp_path) == files_in(saved[8])


def test_steps_taken_during_a_background_save_do_not_change_it(tokenizer_folder, tmp_path, monkeypatch):
    checkpointer, model, optimizer = build_checkpointer(tmp_path, tokenizer_folder, "on")
    may_write = threading.Event()

    def wait_and_write(*arguments, write=checkpoint.write_checkpoint):
        assert may_write.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", wait_and_write)
    take_step(model, optimizer, 2)
    before = [{name: t.clone() for name, t in ts.items()} for ts in (model.state_dict(), optimizer.state_tensors())]
    state = training_state(2)
    checkpointer.save(optimizer, state)
    take_step(model, optimizer, 3)
    state.step, state.guard["losses"][0] = 3, 9.0
    may_write.set()
    checkpointer.wait_until_written()

    found = checkpoint.find_checkpoint(tmp_path)[0]
    weights, moments = load_file(found / "model.safetensors"), load_file(found / "trainer_state/optimizer.safetensors")
    assert weights and all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert moments.keys() == before[1].keys() and all(torch.equal(moments[name], before[1][name]) for name in moments)
    assert json.loads((found / "trainer_state/state.json").read_text())["guard"] == {"losses": [1.0, 1.0]}


def test_any_truncated_or_corrupted_file_is_named_and_the_checkpoint_before_is_used(saved, tmp_path):
    run_dir, rng = tmp_path / "run", random.Random(0)
    shutil.copytree(saved[8], run_dir)
    files = [file for file in (run_dir / "checkpoint-8").rglob("*") if file.is_file()]
    names = [str(file.relative_to(run_dir / "checkpoint-8")) for file in files]
    assert {"model.safetensors", "trainer_state/state.json", "trainer_state/complete.json"} <= set(names)
    for name, file in zip(names, files, strict=True):
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], flipped(content, rng.randrange(8 * len(content))), None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            found, [problem] = find_checkpoint(run_dir)
            assert found.name == "checkpoint-6"
            assert problem.startswith("checkpoint-8 is not used: ")
            if not name.endswith("complete.json"):
                assert f"{name} is {'missing' if damaged is None else 'damaged'}" in problem
        file.write_bytes(content)
    assert find_checkpoint(run_dir) == (run_dir / "checkpoint-8", [])


def test_state_json_keeps_its_form_and_is_read_back(saved, tmp_path):
    """Checkpoints of earlier versions must load: their state.json has the data position as ``cursor``."""
    fields = {"step": 7, "tokens": 700, "data": "fingerprint"}
    fields["cursor"] = {"row": 56, "phase": "pretrain", "phase_row": 8, "taken": {"stories": 8}}
    fields |= {"precision": "bf16", "compiled": True, "learning_rate_scale": 0.5, "guard": {"losses": [1.0]}}
    fields |= {"loss_scale": {}, "record": {"step": 7, "loss": 2.5}}
    (tmp_path / "trainer_state").mkdir()
    (tmp_path / "trainer_state" / "state.json").write_text(json.dumps(fields))
    state = read_state(tmp_path)
    assert state.data_position == DataPosition(row=56, phase="pretrain", phase_row=8, taken={"stories": 8})
    assert (state.step, state.compiled, state.record) == (7, True, {"step": 7, "loss": 2.5})
    assert list(state.to_dict().items()) == list(fields.items())
    saved_fields = json.loads((saved[8] / "checkpoint-8" / "trainer_state" / "state.json").read_text())
    assert saved_fields.keys() == fields.keys() and saved_fields["cursor"]["row"] == 8


def test_any_damage_to_the_marker_is_noticed(saved, tmp_path):
    run_dir, rng = tmp_path / "run", random.Random(0)
    shutil.copytree(saved[8], run_dir)
    marker = run_dir / "checkpoint-8" / "trainer_state" / "complete.json"
    content = marker.read_bytes()
    for byte in range(0, len(content), 5):
        marker.write_bytes(flipped(content, 8 * byte + rng.randrange(8)))
        found, problems = find_checkpoint(run_dir)
        assert found.name == "checkpoint-6" and len(problems) == 1, marker.read_bytes()


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_damaged_checkpoint_is_neither_kept_nor_the_best(saved, tokenizer_folder, tmp_path):
    shutil.copytree(saved[6], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-6"
    newest.rename(newest.with_name("checkpoint-9"))
    (newest.with_name("checkpoint-9") / "model.safetensors").write_bytes(b"")
    (tmp_path / "run" / "best.json").write_text(json.dumps({"step": 9, "bits_per_byte": 0.1}))
    assert find_checkpoint(tmp_path / "run")[0].name == "checkpoint-2"
    save_steps(tmp_path / "run", tokenizer_folder, "off", 4)
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-4", [])
    assert best_step(tmp_path / "run") == 4


def test_a_failed_background_save_is_known_at_once_and_raised_by_the_next(tokenizer_folder, tmp_path, monkeypatch):
    checkpointer, model, optimizer = build_checkpointer(tmp_path, tokenizer_folder, "on")

    def full_disk(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    take_step(model, optimizer, 2)
    with checkpointer:
        checkpointer.save(optimizer, training_state(2))
        checkpointer.record_best(2, 1.0)
        while not checkpointer.failed:
            time.sleep(0.01)
        with pytest.raises(UserError, match="No space left on device"):
            checkpointer.save(optimizer, training_state(4))
    assert not list(tmp_path.iterdir())


def test_a_background_save_is_finished_when_the_run_ends_with_an_error(tokenizer_folder, tmp_path, monkeypatch, capsys):
    checkpointer, model, optimizer = build_checkpointer(tmp_path, tokenizer_folder, "on")
    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: (time.sleep(0.2), save(*arguments)))
    take_step(model, optimizer, 2)
    with pytest.raises(ZeroDivisionError), checkpointer:
        checkpointer.save(optimizer, training_state(2))
        1 / 0  # noqa: B018
    assert find_checkpoint(tmp_path)[0].name == "checkpoint-2"


@pytest.fixture
def save_with(saved, tokenizer_folder, tmp_path, monkeypatch):
    """``save_with(faults)``: save step 6, record it as the best and delete 4, with these faults.

    Asserts that a valid checkpoint is left, that the best is intact, and that the same command resumes from there.
    Returns the exit code and the name of the newest valid checkpoint.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    number = itertools.count()

    def run(faults):
        run_dir, async_save = tmp_path / "run", "on" if next(number) % 2 else "off"  # both do the same operations
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(saved[4], run_dir)
        code, _ = call(save_steps, run_dir, tokenizer_folder, async_save, 6, faults=faults)
        newest, _ = find_checkpoint(run_dir)
        assert newest is not None and newest.name in ("checkpoint-4", "checkpoint-6")
        for folder in run_dir.glob("checkpoint-*"):  # deleting removes the marker first, writing adds it last
            assert checkpoint_problem(folder) in (None, "it was not finished")
        for name in {newest.name, f"checkpoint-{best_step(run_dir)}"}:
            assert files_in(run_dir / name) == files_in(saved[int(name[-1])] / name)
        if code == EXIT_USER_ERROR:
            assert not (run_dir / ".checkpoint-6.partial").exists()  # it would use up the space that is left
        assert save_steps(run_dir, tokenizer_folder, async_save, 8) == 0
        assert files_in(run_dir) == files_in(saved[8])
        return code, newest.name

    return run


EVERY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
"""Fail at every third operation, which takes a minute, or at every one."""


@EVERY
def test_a_save_killed_at_any_operation_loses_nothing(save_with, every):
    found = []
    for number in itertools.count(1, every):
        code, newest = save_with(Faults(kill_at=number))
        found.append(newest)
        if code == 0:
            break
        assert code == KILLED
    assert found == sorted(found) and found[-1] == "checkpoint-6" and number > 50


@EVERY
def test_a_disk_full_from_any_operation_on_loses_nothing(save_with, every):
    found = []
    for number in itertools.count(1, every):
        code, newest = save_with(Faults(full_from=number))
        found.append(newest)
        if code == 0:
            break
        assert code == EXIT_USER_ERROR
    assert found == sorted(found) and found[-1] == "checkpoint-6" and number > 40


@pytest.mark.parametrize("seed", range(8))
def test_a_save_killed_while_the_disk_is_full_loses_nothing(save_with, seed):
    rng = random.Random(seed)
    number = rng.randrange(1, 50)
    code, _ = save_with(Faults(full_from=number, kill_at=number + rng.randrange(1, 8)))
    assert code in (KILLED, EXIT_USER_ERROR)
