"""Saving: killed or out of space at every single operation on files, in the foreground and in the background."""

import errno
import itertools
import json
import os
import random
import shutil
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
from scratch_gpt.training.checkpoint import Checkpointer, TrainingState, best_step, find_checkpoint, problem_with
from tests.training.faults import KILLED, Faults, call

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
BITS_PER_BYTE = {2: 2.0, 4: 3.0, 6: 1.0, 8: 4.0}


def trainer(run_dir, tokenizer_folder, async_save="off"):
    """(saver, model, optimizer) of a tiny run that keeps the newest and the best checkpoint."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer_folder)
    model = build_model(build_config(ModelSettings(preset="modern-30m", **SHAPE), tokenizer), seed=0)
    optimizer = build_optimizer(model, TrainingSettings())
    settings = TrainingSettings(async_save=async_save, keep_last=1)
    return Checkpointer(build_strategy(), run_dir, model, tokenizer, settings), model, optimizer


def take_step(model, optimizer, step):
    """An optimizer step whose result depends on ``step`` alone."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def trainer_state(step):
    return TrainingState(
        step, 100 * step, "data", DataPosition(row=step), "fp32", False, guard={"losses": [1.0] * step}
    )


def save_steps(run_dir, tokenizer_folder, async_save, last):
    """Save every second step, with its validation, as a run does that goes on from the newest checkpoint.

    For short, it takes the steps before that one again.
    """
    checkpointer, model, optimizer = trainer(run_dir, tokenizer_folder, async_save)
    run_dir.mkdir(exist_ok=True)
    remove_partial(run_dir)
    newest, _ = find_checkpoint(run_dir)
    done = 0 if newest is None else int(newest.name.split("-")[1])
    try:
        with checkpointer:
            for step in range(2, last + 1, 2):
                take_step(model, optimizer, step)
                if step > done:
                    checkpointer.save(optimizer, trainer_state(step))
                if step >= done:
                    checkpointer.record_best(step, BITS_PER_BYTE[step])
    except UserError as error:
        assert "No space left on device. Free some space" in str(error)
        return EXIT_USER_ERROR
    return 0


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def saved(tokenizer_folder, tmp_path_factory):
    """``saved[step]``: a run directory after the saves up to ``step``."""
    folder = tmp_path_factory.mktemp("saved")
    for last in BITS_PER_BYTE:
        save_steps(folder / str(last), tokenizer_folder, "off", last)
    return {last: folder / str(last) for last in BITS_PER_BYTE}


def test_the_newest_and_the_best_are_kept(saved):
    kept = {last: sorted(path.name for path in folder.glob("*checkpoint-*")) for last, folder in saved.items()}
    assert kept == {
        2: ["checkpoint-2"],
        4: ["checkpoint-2", "checkpoint-4"],
        6: ["checkpoint-2", "checkpoint-6"],
        8: ["checkpoint-6", "checkpoint-8"],
    }


def test_files_written_in_the_background_are_the_same_bytes(saved, tokenizer_folder, tmp_path):
    save_steps(tmp_path, tokenizer_folder, "on", 8)
    assert contents(tmp_path) == contents(saved[8])


def test_steps_taken_while_a_save_is_under_way_do_not_change_it(tokenizer_folder, tmp_path, monkeypatch):
    checkpointer, model, optimizer = trainer(tmp_path, tokenizer_folder, "on")
    begun = []
    monkeypatch.setattr(checkpointer, "_begin", lambda job, *arguments: begun.append((job, arguments)))
    take_step(model, optimizer, 2)
    before = [{name: t.clone() for name, t in ts.items()} for ts in (model.state_dict(), optimizer.state_tensors())]
    state = trainer_state(2)
    checkpointer.save(optimizer, state)
    take_step(model, optimizer, 3)
    state.step, state.guard["losses"][0] = 3, 9.0
    [(job, arguments)] = begun
    job(*arguments)

    found = checkpoint.find_checkpoint(tmp_path)[0]
    weights, moments = load_file(found / "model.safetensors"), load_file(found / "trainer_state/optimizer.safetensors")
    assert weights and all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert moments.keys() == before[1].keys() and all(torch.equal(moments[name], before[1][name]) for name in moments)
    assert json.loads((found / "trainer_state/state.json").read_text())["guard"] == {"losses": [1.0, 1.0]}


def test_any_file_that_is_cut_or_has_one_bit_flipped_is_named_and_the_one_before_is_taken(saved, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(saved[8], run_dir)
    files = [file for file in (run_dir / "checkpoint-8").rglob("*") if file.is_file()]
    names = [str(file.relative_to(run_dir / "checkpoint-8")) for file in files]
    assert {"model.safetensors", "trainer_state/state.json", "trainer_state/complete.json"} <= set(names)
    for name, file in zip(names, files, strict=True):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], flipped(whole, draw.randrange(8 * len(whole))), None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            found, [problem] = find_checkpoint(run_dir)
            assert found.name == "checkpoint-6"
            assert problem.startswith("checkpoint-8 is not used: ")
            if not name.endswith("complete.json"):
                assert f"{name} is {'missing' if damaged is None else 'damaged'}" in problem
        file.write_bytes(whole)
    assert find_checkpoint(run_dir) == (run_dir / "checkpoint-8", [])


def test_no_damage_to_the_marker_goes_unnoticed(saved, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(saved[8], run_dir)
    marker = run_dir / "checkpoint-8" / "trainer_state" / "complete.json"
    whole = marker.read_bytes()
    for byte in range(0, len(whole), 5):
        marker.write_bytes(flipped(whole, 8 * byte + draw.randrange(8)))
        found, problems = find_checkpoint(run_dir)
        assert found.name == "checkpoint-6" and len(problems) == 1, marker.read_bytes()


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_damaged_checkpoint_counts_neither_among_those_kept_nor_as_the_best(saved, tokenizer_folder, tmp_path):
    shutil.copytree(saved[6], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-6"
    newest.rename(newest.with_name("checkpoint-9"))
    (newest.with_name("checkpoint-9") / "model.safetensors").write_bytes(b"")
    (tmp_path / "run" / "best.json").write_text(json.dumps({"step": 9, "bits_per_byte": 0.1}))
    assert find_checkpoint(tmp_path / "run")[0].name == "checkpoint-2"
    save_steps(tmp_path / "run", tokenizer_folder, "off", 4)
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-4", [])
    assert best_step(tmp_path / "run") == 4


def test_a_save_that_failed_in_the_background_is_known_at_once_and_raised_at_the_next(
    tokenizer_folder, tmp_path, monkeypatch
):
    checkpointer, model, optimizer = trainer(tmp_path, tokenizer_folder, "on")

    def full_disk(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    take_step(model, optimizer, 2)
    with checkpointer:
        checkpointer.save(optimizer, trainer_state(2))
        checkpointer.record_best(2, 1.0)
        while not checkpointer.failed:
            time.sleep(0.01)
        with pytest.raises(UserError, match="No space left on device"):
            checkpointer.save(optimizer, trainer_state(4))
    assert not list(tmp_path.iterdir())


def test_what_is_being_saved_when_a_run_ends_with_an_error_is_finished(tokenizer_folder, tmp_path, monkeypatch, capsys):
    checkpointer, model, optimizer = trainer(tmp_path, tokenizer_folder, "on")
    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: (time.sleep(0.2), save(*arguments)))
    take_step(model, optimizer, 2)
    with pytest.raises(ZeroDivisionError), checkpointer:
        checkpointer.save(optimizer, trainer_state(2))
        1 / 0  # noqa: B018
    assert find_checkpoint(tmp_path)[0].name == "checkpoint-2"


@pytest.fixture
def begin(saved, tokenizer_folder, tmp_path, monkeypatch):
    """``begin(faults)``: step 6 is saved, found to be the best, and 4 deleted, with these faults; gives the exit code.

    Asserts that at least one checkpoint is whole, that the best still is, and that the same command goes on from there.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    number = itertools.count()

    def run(faults):
        run_dir, async_save = tmp_path / "run", "on" if next(number) % 2 else "off"  # which do the same operations
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(saved[4], run_dir)
        code, _ = call(save_steps, run_dir, tokenizer_folder, async_save, 6, faults=faults)
        newest, _ = find_checkpoint(run_dir)
        assert newest is not None and newest.name in ("checkpoint-4", "checkpoint-6")
        for folder in run_dir.glob("checkpoint-*"):  # deleted in the order opposite to that of writing
            assert problem_with(folder) in (None, "it was not finished")
        for name in {newest.name, f"checkpoint-{best_step(run_dir)}"}:
            assert contents(run_dir / name) == contents(saved[int(name[-1])] / name)
        if code == EXIT_USER_ERROR:
            assert not (run_dir / ".checkpoint-6.partial").exists()  # it would take up what space is left
        assert save_steps(run_dir, tokenizer_folder, async_save, 8) == 0
        assert contents(run_dir) == contents(saved[8])
        return code, newest.name

    return run


EVERY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
"""Which operations fail, one after the other: the third part of them in a minute, or all."""


@EVERY
def test_a_save_killed_at_any_operation_loses_nothing(begin, every):
    found = []
    for number in itertools.count(1, every):
        code, newest = begin(Faults(kill_at=number))
        found.append(newest)
        if code == 0:
            break
        assert code == KILLED
    assert found == sorted(found) and found[-1] == "checkpoint-6" and number > 50


@EVERY
def test_a_disk_that_is_full_from_any_operation_on_is_told_and_loses_nothing(begin, every):
    found = []
    for number in itertools.count(1, every):
        code, newest = begin(Faults(full_from=number))
        found.append(newest)
        if code == 0:
            break
        assert code == EXIT_USER_ERROR
    assert found == sorted(found) and found[-1] == "checkpoint-6" and number > 40


@pytest.mark.parametrize("seed", range(8))
def test_killed_while_the_disk_is_full(begin, seed):
    draw = random.Random(seed)
    number = draw.randrange(1, 50)
    code, _ = begin(Faults(full_from=number, kill_at=number + draw.randrange(1, 8)))
    assert code in (KILLED, EXIT_USER_ERROR)
