"""Checkpoints: a Hugging Face model directory plus ``trainer_state/``, complete or absent.

Everything is written to a temporary folder, flushed, renamed; then ``trainer_state/complete.json`` with a SHA-256 of
every file is written last. Deleting removes that marker first. A folder without its marker, or whose files are not what
the marker says, is not a checkpoint. Taking what is to be saved (:class:`Snapshot`) and writing it are two functions, so
that ``saver.py`` can do the second in the background.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from scratch_gpt.config import TrainingSettings
from scratch_gpt.console import print0
from scratch_gpt.data.mixture import DataPosition
from scratch_gpt.distributed.launch import launch_state
from scratch_gpt.distributed.optimizer import Optimizers
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, flush, new_folder, remove_folder, sha256, write_json
from scratch_gpt.model import ScratchGPTForCausalLM

STATE = "trainer_state"
MARKER = "complete.json"
BEST = "best.json"


@dataclass
class TrainingState:
    """What resume needs beside weights, optimizer and random numbers."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Target tokens consumed."""
    data: str
    """Fingerprint of the token shards."""
    cursor: DataPosition
    """Which of their rows were consumed."""
    precision: str
    """bf16, fp32, fp16 or fp8, as chosen at the start of the run."""
    compiled: bool
    """Whether the blocks were compiled."""
    learning_rate_scale: float = 1.0
    """What rollbacks have made of the learning rate."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The guard's window."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """In fp16: the factor, and the steps since it last changed."""
    record: dict[str, Any] = field(default_factory=dict)
    """The metrics of the last step, in case a crash comes before their line is written."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, in CPU memory."""

    weights: dict[str, torch.Tensor]
    """As :func:`weight_tensors`, whole."""
    optimizer: dict[str, torch.Tensor]
    """As :meth:`Optimizers.state_tensors`, whole."""
    rng: dict[str, torch.Tensor]
    """By kind of generator, each (processes, bytes)."""
    state: dict[str, Any]
    """Fields of :class:`TrainingState`."""


def take_snapshot(
    strategy: Strategy, model: torch.nn.Module, optimizer: Optimizers, state: TrainingState, copy: bool
) -> Snapshot:
    """What all processes have at this moment, on the main process; on the others there are no tensors in it.

    ``copy``: into memory of its own, which later steps do not change; else good until the next step only.
    """
    return Snapshot(
        weights=strategy.gather_full(weight_tensors(strategy.unwrap(model)), copy),
        optimizer=strategy.gather_full(optimizer.state_tensors(), copy),
        rng={
            kind: strategy.accelerator.gather(own.unsqueeze(0).to(strategy.device)).cpu()
            for kind, own in _rng_states().items()
        },
        state=dataclasses.asdict(state),
    )


def write_checkpoint(
    snapshot: Snapshot, run_dir: Path, plain: Any, tokenizer: Any, keep_last: int, keep_every: int | None = None
) -> None:
    """Write ``run_dir/checkpoint-{step}`` and then delete all but the newest ``keep_last``, the best, and those of
    every ``keep_every``-th step.

    ``plain``: see :func:`unsharded_model`.

    Raises:
        UserError: it could not be written (a full disk); earlier checkpoints are untouched.
    """
    step = snapshot.state["step"]
    target = run_dir / f"checkpoint-{step}"
    with disk_errors(f"{target} (earlier checkpoints are untouched)"):
        for folder in _folders(run_dir):
            if _step(folder) >= step or not is_complete(folder):  # not valid, or the run would have gone on from it
                delete_checkpoint(folder)
        with new_checkpoint(target) as folder:
            save_model(plain, snapshot.weights, tokenizer, folder)
            save_file(snapshot.optimizer, folder / STATE / "optimizer.safetensors")
            save_file(snapshot.rng, folder / STATE / "rng.safetensors")
            write_json(folder / STATE / "state.json", snapshot.state)
    delete_old(run_dir, keep_last, keep_every)


@contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """A folder to fill, with a folder :data:`STATE` in it, that is ``target`` when the block has ended, complete."""
    if target.is_dir():
        delete_checkpoint(target)
    with new_folder(target) as folder:
        (folder / STATE).mkdir()
        yield folder
    write_json(target / STATE / MARKER, {"sha256": {n: sha256(target / n) for n in _file_names(target)}})


def delete_old(run_dir: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest ``keep_last``, the best, and those of every ``keep_every``-th step."""
    for old in list(_folders(run_dir))[keep_last:]:
        if _step(old) != best_step(run_dir) and not (keep_every and _step(old) % keep_every == 0):
            with disk_errors(f"{run_dir} while deleting {old.name}"):
                delete_checkpoint(old)


def delete_checkpoint(folder: Path) -> None:
    if is_complete(folder):
        (folder / STATE / MARKER).unlink()
        flush(folder / STATE)
    remove_folder(folder)


def is_complete(folder: Path) -> bool:
    """Whether it was written to its end; :func:`find_checkpoint` verifies what it holds."""
    return (folder / STATE / MARKER).is_file()


def record_best(run_dir: Path, step: int, bits_per_byte: float) -> None:
    """Note ``checkpoint-{step}``, if it is there and better than the best that is there, so that it is kept."""
    best = json.loads((run_dir / BEST).read_text()) if (run_dir / BEST).is_file() else None
    if best is not None and not is_complete(run_dir / f"checkpoint-{best['step']}"):
        best = None
    if is_complete(run_dir / f"checkpoint-{step}") and (best is None or bits_per_byte < best["bits_per_byte"]):
        with disk_errors(str(run_dir / BEST)):
            write_json(run_dir / BEST, {"step": step, "bits_per_byte": bits_per_byte})


def best_step(run_dir: Path) -> int | None:
    """Step of the checkpoint with the best validation so far."""
    return json.loads((run_dir / BEST).read_text())["step"] if (run_dir / BEST).is_file() else None


def weight_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, as they are spread; tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def unsharded_model(model: Any, model_class: type = ScratchGPTForCausalLM) -> Any:
    """``model`` without its weights and as no layout has changed it: a sharded model is of a class nobody can load."""
    with torch.device("meta"):
        plain = model_class(model.config)
    if plain.can_generate():
        plain.generation_config = model.generation_config
    return plain


def save_model(plain: Any, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    """A plain Hugging Face directory: weights, config, generation config, code, tokenizer, chat template.

    ``plain``: see :func:`unsharded_model`; ``weights``: whole.
    """
    plain.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def saved_weights(folder: Path) -> SafetensorsReader:
    """Of a model's folder, by name."""
    return SafetensorsReader(folder, "model*.safetensors")


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and one sentence for each newer folder that is not one."""
    problems: list[str] = []
    for folder in _folders(run_dir):
        problem = problem_with(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name} is not used: {problem}")
    return None, problems


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest valid checkpoint, as the main process finds it for all; newer folders that are not one are named."""
    found: list[Path | None] = [None]
    if launch_state().is_main_process:
        found[0], problems = find_checkpoint(run_dir)
        for problem in problems:
            print0(problem)
    broadcast_object_list(found)
    return found[0]


def load_checkpoint(strategy: Strategy, folder: Path, optimizer: Optimizers) -> TrainingState:
    """Restore optimizer and random numbers; the weights were loaded with ``from_pretrained(folder)``."""
    load_optimizer(folder, optimizer)
    rng = load_file(folder / STATE / "rng.safetensors")  # each (processes, bytes)
    if len(rng["cpu"]) == strategy.world_size:
        torch.set_rng_state(rng["cpu"][strategy.rank].clone())  # torch 2.13 crashes over a view into a larger tensor
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"][strategy.rank].clone())
    return read_state(folder)


def load_optimizer(folder: Path, optimizer: Optimizers) -> None:
    """Raises a UserError if the checkpoint's optimizer is of another kind."""
    optimizer.load_state_tensors(SafetensorsReader(folder / STATE, "optimizer.safetensors"))


def _rng_states() -> dict[str, torch.Tensor]:
    """The random number generators of this process, each as bytes: dropout draws from the device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def read_state(folder: Path) -> TrainingState:
    state = json.loads((folder / STATE / "state.json").read_text())
    return TrainingState(**{**state, "cursor": DataPosition(**state["cursor"])})


def _folders(run_dir: Path) -> Iterator[Path]:
    """checkpoint-{step} folders, newest first."""
    found = [folder for folder in run_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    return iter(sorted(found, key=_step, reverse=True))


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _file_names(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    return sorted(str(file.relative_to(folder)) for file in files)


def problem_with(folder: Path) -> str | None:
    """Why ``folder`` is not a checkpoint, or None: the checksum of every file is verified."""
    if not is_complete(folder):
        return "it was not finished"
    try:
        checksums = json.loads((folder / STATE / MARKER).read_text())["sha256"]
    except (ValueError, KeyError):
        return f"{STATE}/{MARKER} is damaged"
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is damaged (its checksum differs)"
    return None


class Checkpointer:
    """Saves the checkpoints of a run, one at a time. All processes call it in the same order; the main one writes.

    As a context manager it waits, at the end of its block, for what was begun.
    """

    def __init__(self, strategy: Strategy, run_dir: Path, model: Any, tokenizer: Any, settings: TrainingSettings):
        self.strategy, self.run_dir, self.model, self.settings = strategy, run_dir, model, settings
        self.plain_model = unsharded_model(strategy.unwrap(model))
        self.tokenizer = deepcopy(tokenizer)  # another thread may not use a tokenizer that is in use
        on_gpu = strategy.device.type != "cpu"
        self.in_background = settings.async_save == "on" or (settings.async_save == "auto" and on_gpu)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._begun: list[Future[None]] = []

    def save(self, optimizer: Optimizers, state: TrainingState) -> None:
        """Write a checkpoint of this moment.

        Raises:
            UserError: it, or the one before, could not be written; see :func:`write_checkpoint`.
        """
        self.wait()
        snapshot = take_snapshot(self.strategy, self.model, optimizer, state, copy=self.in_background)
        keep_last, keep_every = self.settings.keep_last, self.settings.keep_every
        self._begin(write_checkpoint, snapshot, self.run_dir, self.plain_model, self.tokenizer, keep_last, keep_every)

    def record_best(self, step: int, bits_per_byte: float) -> None:
        """See :func:`checkpoint.record_best`; after a save that is under way."""
        self._begin(record_best, self.run_dir, step, bits_per_byte)

    @property
    def failed(self) -> bool:
        """Whether what was begun has come to an error, which :meth:`wait` raises; known to the main process only."""
        return any(job.done() and job.exception() is not None for job in self._begun)

    def wait(self) -> None:
        """Until what was begun is on disk.

        Raises:
            UserError: on all processes, if the main one could not write it.
        """
        error = self._finish()
        message = [None if error is None else str(error)]
        broadcast_object_list(message)
        if error is not None:
            raise error
        if message[0] is not None:
            raise UserError(message[0])

    def _begin(self, job: Callable[..., None], *arguments: Any) -> None:
        if self.strategy.is_main_process:
            self._begun.append(self._thread.submit(job, *arguments))
        if not self.in_background:
            self.wait()

    def _finish(self) -> BaseException | None:
        """The first error of what was begun, once all of it has ended."""
        errors = [job.exception() for job in self._begun]
        self._begun.clear()
        return next((error for error in errors if error is not None), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
            elif (problem := self._finish()) is not None:  # what ended the block is told by its own exception
                print0(f"{type(problem).__name__}: {problem}")
        finally:
            self._thread.shutdown()
