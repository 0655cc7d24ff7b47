"""The training loop: read, forward and backward, judge, step, record, save, validate.

The `Strategy` says how model and data are spread over the processes. The loop owns the data order, the schedule and the
checkpoints, because each of them must follow from a few integers, the step and the rows consumed: then the same command
after a crash writes the same losses, on any number of processes.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scratch_gpt.compute.mfu import MFUMeter
from scratch_gpt.config import PretrainSettings
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
from scratch_gpt.training.metrics import MetricsFile, speed
from scratch_gpt.training.monitor import Looks, Monitor
from scratch_gpt.training.spike_guard import SpikeGuard
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.validation import validate


@dataclass(frozen=True)
class BatchSizes:
    """How the rows of an optimizer step are spread."""

    rows: int
    """Rows of a whole step, over all processes."""
    device_batch_size: int
    """Rows of one forward pass of one process."""
    parts: int
    """Into how many parts the layout divides them."""

    def at(self, step: int, settings: PretrainSettings) -> tuple[int, int]:
        """(rows over all processes, forward passes per process) of ``step``, which may belong to the warm-up."""
        smallest = self.device_batch_size * self.parts
        rows = batch_size_at(step, self.rows, smallest, settings.training)
        return rows, rows // smallest


class Trainer:
    """A run from ``state`` to its last step. All processes call it with the same arguments."""

    def __init__(
        self,
        settings: PretrainSettings,
        run_dir: Path,
        strategy: Strategy,
        model: Any,
        tokenizer: Any,
        optimizer: Optimizers,
        data: TrainingData,
        validation_streams: Mapping[str, TokenStream],
        shape: BatchSizes,
        state: TrainingState,
        looks: Looks | None = None,
    ):
        self.settings, self.training, self.run_dir = settings, settings.training, run_dir
        self.strategy, self.model, self.optimizer = strategy, model, optimizer
        self.data, self.validation_streams, self.shape, self.state = data, validation_streams, shape, state
        self.guard = SpikeGuard(settings.guard, **state.guard)
        self.loss_scaler = LossScaler(state.precision == "fp16", **state.loss_scale)
        self.monitor = Monitor(settings, run_dir, strategy, model, tokenizer, state, looks)
        self.metrics = MetricsFile(
            run_dir / "metrics.jsonl",
            state.step,
            state.cursor.row,
            write=strategy.is_main_process,
            written=self.monitor.written,
        )
        self.checkpointer = Checkpointer(strategy, run_dir, model, tokenizer, settings.training)
        self.watchdog = Watchdog(settings.parallel.timeout, strategy.rank, strategy.world_size)
        self.clock = Clock()
        self.flops = MFUMeter(strategy.accelerator, strategy.unwrap(model).config, data.context_length, state.precision)

    def run(self) -> None:
        """Train to the last step; inside of :attr:`watch`.

        Raises:
            StoppedOnRequest: a signal came, or the time is over; a checkpoint was saved.
            UserError: a checkpoint could not be written (the previous one stays valid), or the run diverged.
        """
        state, max_steps = self.state, self.settings.max_steps
        with (
            self.monitor,
            StopRequest(self.settings.max_hours) as stop,
            progress_bar("pretraining", max_steps, state.step) as bar,
            self.checkpointer,
        ):
            if state.record and self.metrics.last_step < state.step:  # killed between its checkpoint and its line
                self._finish_record(left="?")
            while state.step < max_steps:
                with Prefetcher(self._read_steps()) as reader:  # anew after a step that was not taken
                    while state.step < max_steps and self._train_step(reader, stop):
                        status = f"step {state.step:>5,}/{max_steps:,}  loss {state.record['loss']:.3f}"
                        bar.update(state.step, f"{status}  {speed(state.record)}")

    def _train_step(self, reader: Prefetcher[StepData], stop: StopRequest) -> bool:
        """One optimizer step; False if it was not taken, or undone by a rollback."""
        state, max_steps = self.state, self.settings.max_steps
        rate = learning_rate(state.step, max_steps, self.training) * state.learning_rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.monitor.profiler.before_step(state.step + 1)
        self.watchdog.heartbeat(f"reading the rows of step {state.step + 1:,}")
        asked = time.perf_counter()
        data = next(reader)
        data_seconds = time.perf_counter() - asked
        self.watchdog.heartbeat(f"in step {state.step + 1:,}")
        loss = self.forward_backward(data)
        self.loss_scaler.unscale(self.model.parameters())
        grad_norm = self.strategy.clip_grad_norm(self.model.parameters(), self.training.max_grad_norm)
        must_stop = stop.requested or self.checkpointer.failed
        shared = torch.stack([loss, torch.tensor(float(must_stop), device=loss.device)])
        step_loss, stop_votes = self.strategy.all_reduce_sum(shared).tolist()

        state.cursor = data.cursor
        state.tokens += data.num_targets
        overflow = self.loss_scaler.overflow(step_loss, grad_norm)
        problem = overflow or self.guard.problem(step_loss, grad_norm)
        if problem is None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.monitor.profiler.after_step(state.step + 1)
        if overflow is not None:  # says nothing of the data: the next rows are tried with a smaller scale
            self._event("overflow", overflow)
            return False
        if problem is not None:
            self._do_not_take(problem, finite=math.isfinite(step_loss) and math.isfinite(grad_norm))
            return False
        state.step += 1
        state.guard, state.loss_scale = self.guard.state(), self.loss_scaler.state()

        tokens_per_second = data.num_targets / self.clock.tick()
        order = self.data.order
        state.record = {
            "step": state.step,
            "loss": step_loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": self.flops.mfu(tokens_per_second),
            "data_seconds": round(data_seconds, 6),
            "phase": data.cursor.phase,
            "epochs": {name: round(epochs, 4) for name, epochs in order.epochs(data.cursor).items()},
            "time": round(time.time(), 3),
        }
        last = state.step == max_steps
        self.watchdog.heartbeat(f"recording step {state.step:,}")
        if state.step % self.training.save_every == 0 or last or stop_votes or self.monitor.due():
            self.metrics.flush()  # a checkpoint may not know of steps whose lines a power failure takes
            self.checkpointer.save(self.optimizer, state)
        self._finish_record(left=format_duration((max_steps - state.step) * self.clock.mean))
        if self.monitor.due() and not stop_votes:
            self.checkpointer.wait()  # a look may end the process
            self.monitor.look(self.metrics)
        self.clock.skip()
        if stop_votes and not last:
            self.checkpointer.wait()
            raise StoppedOnRequest(
                f"stopped after step {state.step:,} of {max_steps:,}, saved in "
                f"{self.run_dir}/checkpoint-{state.step}. The same command goes on from there."
            )
        return True

    def forward_backward(self, data: StepData) -> torch.Tensor:
        """Accumulate the gradients of a step; returns this rank's part of its loss, in nats per target of the whole step."""
        return self.strategy.forward_backward(
            self.model, data.batches, data.num_targets, self.state.precision, self.loss_scaler.scale
        )

    def _do_not_take(self, problem: str, finite: bool) -> None:
        """Pass over the data of a bad step; after several in a row, go back to where the weights were good."""
        state = self.state
        self._event("skipped", problem)
        if not self.guard.must_roll_back:
            return
        self.checkpointer.wait()
        checkpoint = newest_checkpoint(self.run_dir)
        if checkpoint is None or self.guard.must_give_up:
            if not finite:
                raise UserError(
                    f"step {state.step + 1:,}: {problem}; the step was not taken, nor were the {self.guard.skipped - 1} "
                    f"tries before it. Lower --training.learning_rate (now {self.training.learning_rate}) and start over "
                    "with --fresh."
                )
            self.guard.accept()
            self._event("accepted", "this is the new normal, or a run in trouble: the guard begins anew")
            return
        before = read_state(checkpoint)
        self.guard.rolled_back(before.guard)
        self.strategy.load_weights(self.model, saved_weights(checkpoint))
        load_checkpoint(self.strategy, checkpoint, self.optimizer)
        state.step, state.record = before.step, before.record
        state.learning_rate_scale *= self.settings.guard.rollback_lr_factor
        self.metrics.roll_back(state.step)
        self._event("rolled back", f"to {checkpoint.name}, learning rate x {state.learning_rate_scale:g}")

    def _event(self, event: str, reason: str) -> None:
        state = self.state
        print0(f"  step {state.step + 1:>5,}  {event}: {reason}")
        self.metrics.write({"event": event, "step": state.step + 1, "row": state.cursor.row, "reason": reason})

    def _finish_record(self, left: str) -> None:
        """Validate if that is due, then write the step's line."""
        record = self.state.record
        step = record["step"]
        if step % self.training.eval_every == 0 or step == self.settings.max_steps:
            result, by_source = validate(
                self.strategy,
                self.model,
                self.validation_streams,
                self.data.context_length,
                self.state.precision,
                self.training.document_mask,
            )
            record |= {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
            if len(by_source) > 1:
                record["validation"] = {name: vars(one) for name, one in by_source.items()}
            self.checkpointer.record_best(step, result.bits_per_byte)
            print0(
                f"  step {step:>5,}  loss {record['loss']:.3f}  validation {result.bits_per_byte:.3f} bits per byte  "
                f"{speed(record)}  {left} left"
            )
        if step % self.training.log_every == 0 or "validation_loss" in record:
            self.metrics.write(record)

    def _read_steps(self) -> Iterator[StepData]:
        """The data of every step that is left, for this process."""
        order, max_steps = self.data.order, self.settings.max_steps
        cursor = self.state.cursor
        for step in range(self.state.step, max_steps):
            cursor = order.at_step(cursor, step, max_steps)
            rows, micro_batches = self.shape.at(step, self.settings)
            data = self.data.read_step(cursor, rows, micro_batches, self.strategy.dp_rank, self.strategy.dp_size)
            if self.strategy.device.type == "cuda":
                data = replace(data, batches=[batch.pin_memory() for batch in data.batches])
            yield data
            cursor = data.cursor


class Clock:
    """Seconds per step, without what happens between steps."""

    def __init__(self) -> None:
        self.total, self.steps = 0.0, 0
        self.start = time.perf_counter()

    def tick(self) -> float:
        seconds = time.perf_counter() - self.start
        self.total, self.steps = self.total + seconds, self.steps + 1
        return seconds

    def skip(self) -> None:
        self.start = time.perf_counter()

    @property
    def mean(self) -> float:
        return self.total / self.steps
