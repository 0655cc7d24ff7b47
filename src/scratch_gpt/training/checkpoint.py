"""Checkpoints: a Hugging Face model folder plus ``trainer_state/``, either complete or absent.

Everything is written to a temporary folder, flushed and renamed; ``trainer_state/complete.json``, with a SHA-256 of every
file, is written last. Deleting removes that marker first. A folder without its marker, or whose files differ from it, is
not a checkpoint.

Tensors are saved in full, by name, whatever the strategy, so that a run can resume under any other strategy. Copying the
state of a run (:class:`Snapshot`) is separate from writing it, so that :class:`Checkpointer` can write in the background.
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
"""Subfolder of a checkpoint with what only training needs."""
MARKER = "complete.json"
BEST = "best.json"


# ------------------------------------------------------------------------------------------------ state


@dataclass
class TrainingState:
    """State that a resume needs besides weights, optimizer state and random number generators."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Target tokens consumed."""
    data: str
    """Fingerprint of the token shards."""
    data_position: DataPosition
    """Position in the shards, up to which they were consumed; ``cursor`` in state.json."""
    precision: str
    """bf16, fp32, fp16 or fp8, as chosen at the start of the run."""
    compiled: bool
    """Whether the blocks were compiled."""
    learning_rate_scale: float = 1.0
    """Product of the learning rate factors of all rollbacks."""
    guard: dict[str, Any] = field(default_factory=dict)
    """:meth:`SpikeGuard.state`."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """:meth:`LossScaler.state`; empty unless the precision is fp16."""
    record: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step, in case of a crash before they are written to metrics.jsonl."""

    def to_dict(self) -> dict[str, Any]:
        """The content of state.json, as a copy."""
        return {
            "cursor" if name == "data_position" else name: value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        fields = dict(fields)
        return cls(data_position=DataPosition(**fields.pop("cursor")), **fields)


def read_state(checkpoint: Path) -> TrainingState:
    return TrainingState.from_dict(json.loads((checkpoint / STATE / "state.json").read_text()))


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint saves, in CPU memory."""

    weights: dict[str, torch.Tensor]
    """:func:`weight_tensors`, in full."""
    optimizer: dict[str, torch.Tensor]
    """:meth:`Optimizers.state_tensors`, in full."""
    rng: dict[str, torch.Tensor]
    """By kind of random number generator, each (world size, bytes)."""
    state: dict[str, Any]
    """:meth:`TrainingState.to_dict`."""


def take_snapshot(
    strategy: Strategy, model: torch.nn.Module, optimizer: Optimizers, state: TrainingState, copy: bool
) -> Snapshot:
    """Gather the current state on the main process; on the others the snapshot has no weights or optimizer state.

    Args:
        copy: copy every tensor, so that later steps do not change the snapshot. Without, it is valid until the next step.
    """
    return Snapshot(
        weights=strategy.gather_full(weight_tensors(strategy.unwrap(model)), copy),
        optimizer=strategy.gather_full(optimizer.state_tensors(), copy),
        rng={
            kind: strategy.accelerator.gather(rng_state.unsqueeze(0).to(strategy.device)).cpu()
            for kind, rng_state in _rng_states().items()
        },
        state=state.to_dict(),
    )


def weight_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, sharded as they are; tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _rng_states() -> dict[str, torch.Tensor]:
    """The state of this process's random number generators, as bytes; dropout uses the device's generator."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# ------------------------------------------------------------------------------------------------ write


def write_checkpoint(
    snapshot: Snapshot, run_dir: Path, unsharded: Any, tokenizer: Any, keep_last: int, keep_every: int | None = None
) -> None:
    """Write ``run_dir/checkpoint-{step}``, then :func:`delete_old`.

    Args:
        unsharded: :func:`unsharded_model`.

    Raises:
        UserError: it could not be written (a full disk); earlier checkpoints are untouched.
    """
    step = snapshot.state["step"]
    target = run_dir / f"checkpoint-{step}"
    with disk_errors(f"{target} (earlier checkpoints are untouched)"):
        for folder in _checkpoint_folders(run_dir):
            # The run would have resumed from a later checkpoint, had it been valid.
            if _step_of(folder) >= step or not is_complete(folder):
                delete_checkpoint(folder)
        with new_checkpoint(target) as folder:
            save_model(unsharded, snapshot.weights, tokenizer, folder)
            save_file(snapshot.optimizer, folder / STATE / "optimizer.safetensors")
            save_file(snapshot.rng, folder / STATE / "rng.safetensors")
            write_json(folder / STATE / "state.json", snapshot.state)
    delete_old(run_dir, keep_last, keep_every)


@contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """Yield a temporary folder (with a subfolder :data:`STATE`), which becomes the complete checkpoint ``target``."""
    if target.is_dir():
        delete_checkpoint(target)
    with new_folder(target) as folder:
        (folder / STATE).mkdir()
        yield folder
    write_json(target / STATE / MARKER, {"sha256": {name: sha256(target / name) for name in _file_names(target)}})


def save_model(unsharded: Any, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face model folder: weights, config, generation config, code, tokenizer, chat template.

    Args:
        unsharded: :func:`unsharded_model`.
        weights: full tensors.
    """
    unsharded.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def unsharded_model(model: Any, model_class: type = ScratchGPTForCausalLM) -> Any:
    """``model`` without weights, as an instance of ``model_class``: a sharded model's class is one that nobody can load."""
    with torch.device("meta"):
        unsharded = model_class(model.config)
    if unsharded.can_generate():
        unsharded.generation_config = model.generation_config
    return unsharded


def record_best(run_dir: Path, step: int, bits_per_byte: float) -> None:
    """Record ``checkpoint-{step}`` in best.json if it exists and is better than the best one that still exists."""
    best = json.loads((run_dir / BEST).read_text()) if (run_dir / BEST).is_file() else None
    if best is not None and not is_complete(run_dir / f"checkpoint-{best['step']}"):
        best = None
    if is_complete(run_dir / f"checkpoint-{step}") and (best is None or bits_per_byte < best["bits_per_byte"]):
        with disk_errors(str(run_dir / BEST)):
            write_json(run_dir / BEST, {"step": step, "bits_per_byte": bits_per_byte})


def best_step(run_dir: Path) -> int | None:
    """Step of the checkpoint with the lowest validation bits per byte so far."""
    return json.loads((run_dir / BEST).read_text())["step"] if (run_dir / BEST).is_file() else None


# ------------------------------------------------------------------------------------------------ delete


def delete_old(run_dir: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest ``keep_last``, the best, and those of every ``keep_every``-th step."""
    for folder in _checkpoint_folders(run_dir)[keep_last:]:
        if _step_of(folder) != best_step(run_dir) and not (keep_every and _step_of(folder) % keep_every == 0):
            with disk_errors(f"{run_dir} while deleting {folder.name}"):
                delete_checkpoint(folder)


def delete_checkpoint(folder: Path) -> None:
    if is_complete(folder):
        (folder / STATE / MARKER).unlink()
        flush(folder / STATE)
    remove_folder(folder)


# ------------------------------------------------------------------------------------------------ find


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest valid checkpoint, found by the main process for all ranks; prints why newer folders are skipped."""
    found: list[Path | None] = [None]
    if launch_state().is_main_process:
        found[0], problems = find_checkpoint(run_dir)
        for problem in problems:
            print0(problem)
    broadcast_object_list(found)
    return found[0]


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and one sentence for each newer folder that is not valid."""
    problems: list[str] = []
    for folder in _checkpoint_folders(run_dir):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name} is not used: {problem}")
    return None, problems


def checkpoint_problem(folder: Path) -> str | None:
    """Why ``folder`` is not a valid checkpoint, or None. Verifies the checksum of every file."""
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


def is_complete(folder: Path) -> bool:
    """Whether it was written to the end; :func:`checkpoint_problem` also verifies its files."""
    return (folder / STATE / MARKER).is_file()


def _checkpoint_folders(run_dir: Path) -> list[Path]:
    """The checkpoint-{step} folders, newest first."""
    folders = [folder for folder in run_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _file_names(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    return sorted(str(file.relative_to(folder)) for file in files)


# ------------------------------------------------------------------------------------------------ load


def load_checkpoint(strategy: Strategy, folder: Path, optimizer: Optimizers) -> TrainingState:
    """Restore the optimizer and the random number generators; the weights are loaded separately.

    With another world size than the checkpoint's, the generators are left as they are.
    """
    load_optimizer(folder, optimizer)
    rng = load_file(folder / STATE / "rng.safetensors")  # each (world size, bytes)
    if len(rng["cpu"]) == strategy.world_size:
        torch.set_rng_state(rng["cpu"][strategy.rank].clone())  # torch 2.13 crashes on a view of a larger tensor
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"][strategy.rank].clone())
    return read_state(folder)


def load_optimizer(folder: Path, optimizer: Optimizers) -> None:
    """Restore the optimizer from a checkpoint.

    Raises:
        UserError: the checkpoint has the state of another kind of optimizer.
    """
    optimizer.load_state_tensors(SafetensorsReader(folder / STATE, "optimizer.safetensors"))


def saved_weights(folder: Path) -> SafetensorsReader:
    """The weights of a model folder, by name."""
    return SafetensorsReader(folder, "model*.safetensors")


# ------------------------------------------------------------------------------------------------ over a run


class Checkpointer:
    """Saves the checkpoints of a run, one at a time. All ranks call it in the same order; the main process writes.

    As a context manager, it waits for pending writes at the end of its block.
    """

    def __init__(self, strategy: Strategy, run_dir: Path, model: Any, tokenizer: Any, training: TrainingSettings):
        self.strategy, self.run_dir, self.model, self.training = strategy, run_dir, model, training
        self.unsharded = unsharded_model(strategy.unwrap(model))
        self.tokenizer = deepcopy(tokenizer)  # a tokenizer must not be used by two threads at once
        on_gpu = strategy.device.type != "cpu"
        self.in_background = training.async_save == "on" or (training.async_save == "auto" and on_gpu)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save(self, optimizer: Optimizers, state: TrainingState) -> None:
        """Save a checkpoint of the current state.

        Raises:
            UserError: this checkpoint, or the previous one in the background, could not be written.
        """
        self.wait_until_written()
        snapshot = take_snapshot(self.strategy, self.model, optimizer, state, copy=self.in_background)
        keep_last, keep_every = self.training.keep_last, self.training.keep_every
        self._submit(write_checkpoint, snapshot, self.run_dir, self.unsharded, self.tokenizer, keep_last, keep_every)

    def record_best(self, step: int, bits_per_byte: float) -> None:
        """:func:`record_best`, after the pending writes."""
        self._submit(record_best, self.run_dir, step, bits_per_byte)

    @property
    def failed(self) -> bool:
        """Whether a pending write has failed, for :meth:`wait_until_written` to raise; only the main process knows."""
        return any(write.done() and write.exception() is not None for write in self._pending)

    def wait_until_written(self) -> None:
        """Wait until everything submitted is on disk.

        Raises:
            UserError: on all ranks, if the main process could not write.
        """
        error = self._first_error()
        message = [None if error is None else str(error)]
        broadcast_object_list(message)
        if error is not None:
            raise error
        if message[0] is not None:
            raise UserError(message[0])

    def _submit(self, write: Callable[..., None], *arguments: Any) -> None:
        if self.strategy.is_main_process:
            self._pending.append(self._writer.submit(write, *arguments))
        if not self.in_background:
            self.wait_until_written()

    def _first_error(self) -> BaseException | None:
        """Wait for all pending writes; the first error among them."""
        errors = [write.exception() for write in self._pending]
        self._pending.clear()
        return next((error for error in errors if error is not None), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait_until_written()
            elif (write_error := self._first_error()) is not None:  # the exception that ended the block goes first
                print0(f"{type(write_error).__name__}: {write_error}")
        finally:
            self._writer.shutdown()
