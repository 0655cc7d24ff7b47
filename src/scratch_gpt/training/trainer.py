"""The training loop: read, forward and backward, check, optimizer step, record, save, validate.

The `Strategy` knows how model and data are distributed over the ranks. The trainer owns the data order, the schedules and
the checkpoints, each of which follows from a few integers (the step, and how much data was consumed): so the same command
after a crash gives the same losses, on any number of ranks.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scratch_gpt.compute.mfu import MFUMeter
from scratch_gpt.config import PretrainSettings, TrainingSettings
from scratch_gpt.console import format_duration, print0, progress_bar
from scratch_gpt.data.loader import Prefetcher, StepData, TrainingData
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.distributed.optimizer import Optimizers
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.distributed.watchdog import Watchdog
from scratch_gpt.errors import StoppedOnRequest, UserError
from scratch_gpt.training.checkpoint import (
    Checkpointer,
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    saved_weights,
)
from scratch_gpt.training.loss_scaler import LossScaler
from scratch_gpt.training.lr_schedule import batch_size_at, learning_rate
from scratch_gpt.training.metrics import MetricsFile, format_speed
from scratch_gpt.training.monitor import Monitor
from scratch_gpt.training.spike_guard import SpikeGuard
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.validation import validate


@dataclass
class TrainUnit:
    """Model and optimizer, and how they are distributed over the ranks."""

    strategy: Strategy
    model: Any
    """As the strategy parallelized and wrapped it."""
    optimizer: Optimizers
    tokenizer: Any
    """Saved with the model."""


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of an optimizer step, and how they are divided."""

    sequences: int
    """Per optimizer step, over all ranks."""
    device_batch_size: int
    """Per forward pass of one rank."""
    dp_size: int
    """Data-parallel ranks that share a step's sequences."""

    def at(self, step: int, training: TrainingSettings) -> tuple[int, int]:
        """(sequences over all ranks, forward passes per rank) of ``step``, which may be part of the batch warm-up."""
        micro_batch_size = self.device_batch_size * self.dp_size
        sequences = batch_size_at(step, self.sequences, micro_batch_size, training)
        return sequences, sequences // micro_batch_size


@dataclass
class RunData:
    """Data of a run."""

    train: TrainingData
    validation: Mapping[str, TokenStream]
    """The held-out text of each source."""
    batch_sizes: BatchSizes


class TrainerCallback:
    """Hooks into the training loop, on every rank. Override any of them, and pass instances to `pretrain`.

    A hook may change what it is given: the trainer's attributes, the batches, the gradients.
    """

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step_begin(self, trainer: "Trainer", data: StepData) -> None:
        """The step's data was read; the forward pass is next."""

    def on_loss(self, trainer: "Trainer", data: StepData, loss: torch.Tensor) -> torch.Tensor:
        """After the backward pass: this rank's share of the loss, in nats per target of the step; return what to use."""
        return loss

    def on_step_end(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """After a step that was neither skipped nor rolled back: it is counted, saved if due, and recorded."""


class Trainer:
    """Trains from ``state`` to the last step. All ranks call it with the same arguments."""

    def __init__(
        self,
        settings: PretrainSettings,
        run_dir: Path,
        unit: TrainUnit,
        data: RunData,
        state: TrainingState,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.settings, self.training, self.run_dir = settings, settings.training, run_dir
        self.strategy, self.model, self.optimizer = unit.strategy, unit.model, unit.optimizer
        self.data, self.state, self.callbacks = data, state, callbacks
        self.guard = SpikeGuard(settings.guard, **state.guard)
        self.loss_scaler = LossScaler(state.precision == "fp16", **state.loss_scale)
        self.monitor = Monitor(settings, run_dir, self.strategy, self.model, unit.tokenizer, state)
        self.metrics = MetricsFile(
            run_dir / "metrics.jsonl",
            state.step,
            state.data_position.row,
            write=self.strategy.is_main_process,
            on_write=self.monitor.log,
        )
        self.checkpointer = Checkpointer(self.strategy, run_dir, self.model, unit.tokenizer, self.training)
        self.watchdog = Watchdog(settings.parallel.timeout, self.strategy.rank, self.strategy.world_size)
        self.step_timer = StepTimer()
        self.mfu_meter = MFUMeter(
            self.strategy.accelerator,
            self.strategy.unwrap(self.model).config,
            data.train.context_length,
            state.precision,
        )

    def run(self) -> None:
        """Train to the last step; call it within :attr:`watchdog`.

        Raises:
            StoppedOnRequest: a signal came, or the time is up; a checkpoint was saved.
            UserError: a checkpoint could not be written (the previous one stays valid), or the run diverged.
        """
        state, max_steps = self.state, self.settings.max_steps
        with (
            self.monitor,
            StopRequest(self.settings.max_hours) as stop,
            progress_bar("pretraining", max_steps, state.step) as bar,
            self.checkpointer,
        ):
            for callback in self.callbacks:
                callback.on_train_begin(self)
            if state.record and self.metrics.last_step < state.step:  # killed after its checkpoint, before its record
                self._record_step(time_left="?")
            while state.step < max_steps:
                # Skipping a step or rolling back changes what comes next, so reading starts again from there.
                with Prefetcher(self.read_steps()) as steps:
                    while state.step < max_steps and self.train_step(steps, stop):
                        status = f"step {state.step:>5,}/{max_steps:,}  loss {state.record['loss']:.3f}"
                        bar.update(state.step, f"{status}  {format_speed(state.record)}")

    def read_steps(self) -> Iterator[StepData]:
        """Read this rank's data of every remaining step."""
        order, max_steps = self.data.train.order, self.settings.max_steps
        position = self.state.data_position
        for step in range(self.state.step, max_steps):
            position = order.at_step(position, step, max_steps)
            sequences, micro_batches = self.data.batch_sizes.at(step, self.training)
            data = self.data.train.read_step(
                position, sequences, micro_batches, self.strategy.dp_rank, self.strategy.dp_size
            )
            if self.strategy.device.type == "cuda":
                data = replace(data, batches=[batch.pin_memory() for batch in data.batches])
            yield data
            position = data.cursor

    def train_step(self, steps: Iterator[StepData], stop: StopRequest) -> bool:
        """Take one optimizer step; False if it was skipped, or undone by a rollback."""
        state, max_steps = self.state, self.settings.max_steps
        lr = learning_rate(state.step, max_steps, self.training) * state.learning_rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.monitor.profiler.before_step(state.step + 1)
        self.watchdog.heartbeat(f"reading the data of step {state.step + 1:,}")
        start = time.perf_counter()
        data = next(steps)
        data_seconds = time.perf_counter() - start

        self.watchdog.heartbeat(f"in step {state.step + 1:,}")
        for callback in self.callbacks:
            callback.on_step_begin(self, data)
        local_loss = self.forward_backward(data)
        for callback in self.callbacks:
            local_loss = callback.on_loss(self, data, local_loss)
        self.loss_scaler.unscale(self.model.parameters())
        grad_norm = self.strategy.clip_grad_norm(self.model.parameters(), self.training.max_grad_norm)
        must_stop = stop.requested or self.checkpointer.failed
        # one all-reduce for both: the loss of the step, and whether any rank must stop
        sums = torch.stack([local_loss, torch.tensor(float(must_stop), device=local_loss.device)])
        loss, stop_votes = self.strategy.all_reduce_sum(sums).tolist()

        state.data_position = data.cursor
        state.tokens += data.num_targets
        overflow = self.loss_scaler.overflow(loss, grad_norm)
        problem = overflow or self.guard.problem(loss, grad_norm)
        if problem is None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.monitor.profiler.after_step(state.step + 1)
        if overflow is not None:  # not the data's fault: retry with the next data and a smaller loss scale
            self._write_event("overflow", overflow)
            return False
        if problem is not None:
            self._skip_step(problem, finite=math.isfinite(loss) and math.isfinite(grad_norm))
            return False

        state.step += 1
        state.guard, state.loss_scale = self.guard.state(), self.loss_scaler.state()
        tokens_per_second = data.num_targets / self.step_timer.stop()
        epochs = self.data.train.order.epochs(data.cursor)
        state.record = {
            "step": state.step,
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": self.mfu_meter.mfu(tokens_per_second),
            "data_seconds": round(data_seconds, 6),
            "phase": data.cursor.phase,
            "epochs": {source: round(count, 4) for source, count in epochs.items()},
            "time": round(time.time(), 3),
        }

        is_last = state.step == max_steps
        self.watchdog.heartbeat(f"recording step {state.step:,}")
        if state.step % self.training.save_every == 0 or is_last or stop_votes or self.monitor.evaluation_due:
            self.metrics.flush()  # no checkpoint may be ahead of its metrics, even after a power failure
            self.checkpointer.save(self.optimizer, state)
        self._record_step(time_left=format_duration((max_steps - state.step) * self.step_timer.mean))
        for callback in self.callbacks:
            callback.on_step_end(self, state.record)
        if self.monitor.evaluation_due and not stop_votes:
            self.checkpointer.wait_until_written()  # an evaluation may end the process
            self.monitor.evaluate(self.metrics)
        self.step_timer.start()
        if stop_votes and not is_last:
            self.checkpointer.wait_until_written()
            raise StoppedOnRequest(
                f"stopped after step {state.step:,} of {max_steps:,}, saved in "
                f"{self.run_dir}/checkpoint-{state.step}. The same command resumes from there."
            )
        return True

    def forward_backward(self, data: StepData) -> torch.Tensor:
        """Accumulate the gradients of a step; returns this rank's share of its loss, in nats per target of the step."""
        return self.strategy.forward_backward(
            self.model, data.batches, data.num_targets, self.state.precision, self.loss_scaler.scale
        )

    def _skip_step(self, problem: str, finite: bool) -> None:
        """Skip a bad step's data. After several in a row, roll back; if that does not help, accept them or give up."""
        state = self.state
        self._write_event("skipped", problem)
        if not self.guard.must_roll_back:
            return
        self.checkpointer.wait_until_written()
        checkpoint = newest_checkpoint(self.run_dir)
        if checkpoint is not None and not self.guard.must_give_up:
            self._roll_back(checkpoint)
        elif finite:
            self.guard.accept()
            self._write_event("accepted", "the loss stays high: the guard takes it for normal and starts anew")
        else:
            raise UserError(
                f"step {state.step + 1:,}: {problem}; the step was skipped, like the {self.guard.skipped - 1} "
                f"attempts before it. Lower --training.learning_rate (now {self.training.learning_rate}) and start over "
                "with --fresh."
            )

    def _roll_back(self, checkpoint: Path) -> None:
        """Restore weights and optimizer of ``checkpoint``, and continue with the data that follows."""
        state, saved = self.state, read_state(checkpoint)
        self.guard.rolled_back(saved.guard)
        self.strategy.load_weights(self.model, saved_weights(checkpoint))
        load_checkpoint(self.strategy, checkpoint, self.optimizer)
        state.step, state.record = saved.step, saved.record
        state.learning_rate_scale *= self.settings.guard.rollback_lr_factor
        self.metrics.roll_back(state.step)
        self._write_event("rolled back", f"to {checkpoint.name}, learning rate x {state.learning_rate_scale:g}")

    def _write_event(self, event: str, reason: str) -> None:
        state = self.state
        print0(f"  step {state.step + 1:>5,}  {event}: {reason}")
        self.metrics.write({"event": event, "step": state.step + 1, "row": state.data_position.row, "reason": reason})

    def _record_step(self, time_left: str) -> None:
        """Validate if due, then write the record of the last step if due."""
        record = self.state.record
        step = record["step"]
        if step % self.training.eval_every == 0 or step == self.settings.max_steps:
            self._validate(record, time_left)
        if step % self.training.log_every == 0 or "validation_loss" in record:
            self.metrics.write(record)

    def _validate(self, record: dict[str, Any], time_left: str) -> None:
        """Add the validation scores to ``record``."""
        score, by_source = validate(
            self.strategy,
            self.model,
            self.data.validation,
            self.data.train.context_length,
            self.state.precision,
            self.training.document_mask,
        )
        record |= {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
        if len(by_source) > 1:
            record["validation"] = {source: vars(its_score) for source, its_score in by_source.items()}
        self.checkpointer.record_best(record["step"], score.bits_per_byte)
        print0(
            f"  step {record['step']:>5,}  loss {record['loss']:.3f}  validation {score.bits_per_byte:.3f} bits per byte  "
            f"{format_speed(record)}  {time_left} left"
        )


class StepTimer:
    """Seconds per step, without what happens between steps (saving, validation)."""

    def __init__(self) -> None:
        self.total_seconds, self.num_steps = 0.0, 0
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since the start; also counts a step."""
        seconds = time.perf_counter() - self.started
        self.total_seconds, self.num_steps = self.total_seconds + seconds, self.num_steps + 1
        return seconds

    @property
    def mean(self) -> float:
        return self.total_seconds / self.num_steps
