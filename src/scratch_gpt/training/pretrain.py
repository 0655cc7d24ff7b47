"""Pretraining: text to tokenizer to shards to checkpoints to ``final/``.

    scratch-gpt pretrain --run-dir runs/mine --corpus book.txt --max-steps 1000
    accelerate launch --num_processes 8 -m scratch_gpt pretrain --config pretrain.yaml

Accelerate brings device, launch and autocast. The loop owns the data order, the schedule and the checkpoints, because
each of them must follow from a few integers, the step and the rows consumed: then the same command after a crash writes
the same losses. So Accelerate does not prepare the loader, whose state it would keep per process.
"""

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from scratch_gpt.config import PhaseSettings, PretrainSettings
from scratch_gpt.console import duration, progress_bar, say
from scratch_gpt.data.loader import ReadAhead, StepData, TrainingData
from scratch_gpt.data.mixture import Cursor, TrainingOrder
from scratch_gpt.data.packing import BestFit, pack
from scratch_gpt.data.prepare import prepare, summary
from scratch_gpt.data.shards import TokenStream, content_fingerprint, read_manifest
from scratch_gpt.data.sources import split_documents
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from scratch_gpt.errors import StoppedOnRequest, UserError
from scratch_gpt.files import disk_errors, new_folder
from scratch_gpt.model import ScratchGPTForCausalLM
from scratch_gpt.training.build import build_config, build_model
from scratch_gpt.training.checkpoint import (
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    save_model,
)
from scratch_gpt.training.launch import launched_processes
from scratch_gpt.training.metrics import MetricsFile
from scratch_gpt.training.optimizer import build_optimizer
from scratch_gpt.training.precision import Arithmetic, choose_arithmetic, compile_blocks
from scratch_gpt.training.run import record_settings, run_directory, stored_settings
from scratch_gpt.training.schedule import learning_rate
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.validation import validate


def pretrain_command(settings: PretrainSettings) -> None:
    """`scratch-gpt pretrain`."""
    state = launched_processes()
    # One process looks at the run directory and holds its lock; the others wait until it is ready.
    if state.is_main_process:
        with run_directory(settings) as run_dir:
            if (run_dir / "final").is_dir() and stored_settings(run_dir).get("max_steps") == settings.max_steps:
                say(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
                return
            record_settings(run_dir, settings)
            prepare_tokenizer(settings, run_dir)
            prepare_data(settings, run_dir)
            state.wait_for_everyone()
            Pretraining(settings, run_dir).run()
    else:
        state.wait_for_everyone()
        Pretraining(settings, Path(settings.run_dir)).run()


def prepare_tokenizer(settings: PretrainSettings, run_dir: Path) -> None:
    """Train the tokenizer that the run directory does not have yet."""
    path = tokenizer_folder(settings, run_dir)
    if settings.tokenizer_path is None and not path.is_dir():
        train, _, _ = split_documents(settings)
        tokenizer = train_tokenizer(train, settings.tokenizer)
        with disk_errors(str(path)), new_folder(path) as folder:
            save_tokenizer(tokenizer, folder)
    say(f"tokenizer  {len(load_tokenizer(path)):,} tokens in {path}")


def prepare_data(settings: PretrainSettings, run_dir: Path) -> None:
    """Make the shards that the run directory does not have yet."""
    tokenizer_path = tokenizer_folder(settings, run_dir)
    if settings.data_path is None:
        manifest = prepare(settings, tokenizer_path, data_folder(settings, run_dir))
    else:
        manifest = read_manifest(Path(settings.data_path))
        if manifest["tokenizer"] != fingerprint(tokenizer_path):
            raise UserError(f"{settings.data_path} was made with another tokenizer than {tokenizer_path}")
    say(f"data       {summary(manifest)}")


def tokenizer_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "tokenizer" if settings.tokenizer_path is None else Path(settings.tokenizer_path)


def data_folder(settings: PretrainSettings, run_dir: Path) -> Path:
    return run_dir / "data" if settings.data_path is None else Path(settings.data_path)


STEP_OVERHEAD = 1.2
"""A whole step over its forward and backward pass: optimizer, validation, checkpoints."""
FEWEST_STEPS = 30


class Pretraining:
    """One run: built from its settings, or from its newest valid checkpoint where there is one.

    ``settings.max_steps`` may still be None here, with ``budget_seconds`` to say how long the run will be about.
    """

    def __init__(self, settings: PretrainSettings, run_dir: Path, budget_seconds: float | None = None):
        self.settings, self.run_dir, self.budget_seconds = settings, run_dir, budget_seconds
        self.tokenizer = load_tokenizer(tokenizer_folder(settings, run_dir))
        folder = data_folder(settings, run_dir)
        manifest = read_manifest(folder)
        self.data_fingerprint = content_fingerprint(manifest)
        self.train_streams, self.validation_streams = (
            {name: TokenStream.open(folder, split, manifest, name) for name in manifest["sources"]}
            for split in ("train", "validation")
        )

        self.checkpoint, problems = find_checkpoint(run_dir)
        for problem in problems:
            say(problem)
        if self.checkpoint is None:
            self.model = build_model(build_config(settings.model, self.tokenizer), settings.seed)
        else:
            self.model = ScratchGPTForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
        self.model.train()
        if manifest["vocab_size"] > self.model.config.vocab_size:
            raise UserError(
                f"{folder} was made with a vocabulary of {manifest['vocab_size']} tokens, the model has "
                f"{self.model.config.vocab_size}: take the shards of the model's own tokenizer"
            )

        self.context_length = self._context_length()
        self.order = self._order()
        self.data = TrainingData(
            self.train_streams,
            self.order,
            self.context_length,
            settings.training.document_mask,
            self.model.config.vocab_size,
        )
        processes = launched_processes()
        world = processes.num_processes
        self.rows_per_step, self.micro_batches = self._batch_shape(world)
        self.arithmetic = self._choose_arithmetic(processes)
        say(
            f"model      {self.num_parameters:,} parameters, context {self.context_length}, "
            f"{self.rows_per_step * self.context_length:,} tokens a step on {world} process(es)"
        )
        how = "compiled" if self.arithmetic.compiled else "eager"
        say(f"arithmetic {self.arithmetic.precision}, {how}: {self.arithmetic.reason}")

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def steps_in(self, seconds: float) -> int:
        """How many optimizer steps fit into ``seconds``, as measured at the start; at least :data:`FEWEST_STEPS`."""
        steps = int(seconds / (self.arithmetic.seconds_per_step * STEP_OVERHEAD))
        return max(FEWEST_STEPS, steps // 10 * 10)

    def run(self) -> None:
        """Train to the last step and write ``final/``.

        Raises:
            StoppedOnRequest: a signal came; a checkpoint was saved.
            UserError: a checkpoint could not be written; the previous one stays valid.
        """
        training, max_steps = self.settings.training, self.settings.max_steps
        accelerator = Accelerator(mixed_precision="bf16" if self.arithmetic.precision == "bf16" else "no")
        model = accelerator.prepare_model(self.model)
        optimizer = build_optimizer(self.model, training)
        state = TrainerState(
            step=0,
            tokens=0,
            data=self.data_fingerprint,
            cursor=Cursor(),
            precision=self.arithmetic.precision,
            compiled=self.arithmetic.compiled,
            record={},
        )
        if self.checkpoint is not None:
            state = load_checkpoint(accelerator, self.checkpoint, optimizer)
            say(f"resumed    {self.checkpoint.name}: {state.step:,} of {max_steps:,} steps are done")
        if state.step < max_steps and accelerator.is_main_process:
            shutil.rmtree(self.run_dir / "final", ignore_errors=True)  # of a shorter run: it is in the checkpoint
        metrics = MetricsFile(
            self.run_dir / "metrics.jsonl", keep_through=state.step, write=accelerator.is_main_process
        )
        if state.record and metrics.last_step < state.step:  # killed between its checkpoint and its line
            self._finish_record(accelerator, model, metrics, state.record, left="?")

        steps = self._read_steps(state, accelerator)
        with (
            StopRequest() as stop,
            progress_bar("pretraining", max_steps, state.step) as bar,
            ReadAhead(steps) as reader,
        ):
            clock = Clock()
            while state.step < max_steps:
                rate = learning_rate(state.step, max_steps, training)
                for group in optimizer.param_groups:
                    group["lr"] = rate

                asked = time.perf_counter()
                data = next(reader)
                data_seconds = time.perf_counter() - asked
                loss = torch.zeros((), device=accelerator.device)
                for batch in data.batches:
                    batch = batch.to(accelerator.device)
                    with accelerator.autocast():
                        micro_loss = model(
                            input_ids=batch.input_ids,
                            position_ids=batch.position_ids,
                            labels=batch.labels,
                            shift_labels=batch.labels,
                            num_items_in_batch=data.num_targets,
                        ).loss
                    # Data parallelism averages gradients over processes; what we want is their sum.
                    (micro_loss * accelerator.num_processes).backward()
                    loss += micro_loss.detach()
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm))
                if not math.isfinite(grad_norm):
                    raise UserError(self._diverged(state.step + 1, float(loss), grad_norm))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.step += 1
                state.tokens += data.num_targets
                state.cursor = data.cursor

                shared = torch.stack([loss, torch.tensor(float(stop.requested), device=accelerator.device)])
                step_loss, stop_votes = accelerator.reduce(shared, "sum").tolist()
                seconds_per_step = clock.tick()
                last = state.step == max_steps
                state.record = {
                    "step": state.step,
                    "loss": step_loss,
                    "learning_rate": rate,
                    "grad_norm": grad_norm,
                    "tokens": state.tokens,
                    "tokens_per_second": round(data.num_targets / seconds_per_step, 1),
                    "data_seconds": round(data_seconds, 6),
                    "phase": data.cursor.phase,
                    "epochs": {name: round(epochs, 4) for name, epochs in self.order.epochs(data.cursor).items()},
                    "time": round(time.time(), 3),
                }
                left = duration((max_steps - state.step) * clock.mean)
                bar.update(state.step, f"step {state.step}/{max_steps} loss {step_loss:.3f}")

                if state.step % training.save_every == 0 or last or stop_votes:
                    save_checkpoint(
                        accelerator, self.run_dir, model, self.tokenizer, optimizer, state, training.keep_last
                    )
                self._finish_record(accelerator, model, metrics, state.record, left)
                clock.skip()
                if stop_votes and not last:
                    raise StoppedOnRequest(
                        f"stopped after step {state.step:,} of {max_steps:,}, saved in "
                        f"{self.run_dir}/checkpoint-{state.step}. The same command goes on from there."
                    )
        read = (f"{name} {epochs:.2f} times" for name, epochs in self.order.epochs(state.cursor).items())
        say(f"data read  {', '.join(read)}")
        self._save_final(accelerator)
        accelerator.end_training()

    def _finish_record(
        self, accelerator: Accelerator, model: Any, metrics: MetricsFile, record: dict[str, Any], left: str
    ) -> None:
        """Validate if that is due, then write the step's line."""
        step, training = record["step"], self.settings.training
        if step % training.eval_every == 0 or step == self.settings.max_steps:
            result, by_source = validate(
                accelerator, model, self.validation_streams, self.context_length, training.document_mask
            )
            record |= {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
            if len(by_source) > 1:
                record["validation"] = {name: vars(one) for name, one in by_source.items()}
            say(
                f"  step {step:>5,}  loss {record['loss']:.3f}  validation {result.bits_per_byte:.3f} bits per byte  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left} left"
            )
        if step % training.log_every == 0 or "validation_loss" in record:
            metrics.write(record)

    def _read_steps(self, state: TrainerState, accelerator: Accelerator) -> Iterator[StepData]:
        """The data of every step that is left, for this process."""
        cursor, max_steps = state.cursor, self.settings.max_steps
        process, processes = accelerator.process_index, accelerator.num_processes
        for step in range(state.step, max_steps):
            cursor = self.order.at_step(cursor, step, max_steps)
            data = self.data.read_step(cursor, self.rows_per_step, self.micro_batches, process, processes)
            if accelerator.device.type == "cuda":
                data.batches[:] = [batch.pin_memory() for batch in data.batches]
            yield data
            cursor = data.cursor

    def _save_final(self, accelerator: Accelerator) -> None:
        target = self.run_dir / "final"
        if accelerator.is_main_process:
            with disk_errors(f"{target} (the checkpoints are untouched)"), new_folder(target) as folder:
                save_model(accelerator.unwrap_model(self.model, keep_fp32_wrapper=False), self.tokenizer, folder)
            say(f"saved      {target}")
        accelerator.wait_for_everyone()

    def _diverged(self, step: int, loss: float, grad_norm: float) -> str:
        return (
            f"step {step:,}: the loss is {loss:.4g} and the gradient norm {grad_norm}; the step was not taken. Lower "
            f"--training.learning_rate (now {self.settings.training.learning_rate}) and start over with --fresh."
        )

    def _context_length(self) -> int:
        longest = self.model.config.max_position_embeddings
        context = self.settings.training.context_length or longest
        if self.model.config.position_embedding_type == "learned" and context > longest:
            raise UserError(f"--training.context_length is {context}, the model has {longest} learned positions")
        for split, streams in (("training", self.train_streams), ("held-out", self.validation_streams)):
            num_tokens = sum(map(len, streams.values()))
            if num_tokens < (context + 1 if split == "training" else 2):
                raise UserError(
                    f"the {split} text has only {num_tokens} tokens, one row takes {context + 1}: give more text or "
                    "a smaller --training.context_length"
                )
        return context

    def _order(self) -> TrainingOrder:
        """The rows of every source, and the mixtures of the run's phases."""
        training, seed = self.settings.training, self.settings.seed
        if training.phases and training.mixture:
            raise UserError("give --training.mixture or --training.phases, not both: each phase has its own mixture")
        packings = {
            name: pack(stream, training.packing, self.context_length, training.document_mask, seed, name)
            for name, stream in self.train_streams.items()
        }
        order = TrainingOrder(packings, training.phases or [PhaseSettings("pretrain", 1.0, training.mixture)])
        for name, packing in packings.items():
            if isinstance(packing, BestFit):
                say(f"packing    {name}: {packing.rows_per_epoch:,} rows an epoch, {packing.waste:.2%} padding")
        if len(packings) > 1:
            for phase in order.phases:
                shares = (f"{name} {float(share):.1%}" for name, share in order.mixtures[phase.name].shares.items())
                say(f"mixture    {phase.name} ({phase.share:.0%} of the steps): {', '.join(shares)} of the rows")
        return order

    def _batch_shape(self, world: int) -> tuple[int, int]:
        """(rows per optimizer step over all processes, forward passes per step and process)."""
        training = self.settings.training
        rows, remainder = divmod(training.total_batch_size, self.context_length)
        if remainder or rows == 0 or rows % world:
            raise UserError(
                f"--training.total_batch_size is {training.total_batch_size} tokens; it must be a multiple of "
                f"{self.context_length} (context) x {world} (processes)"
            )
        per_process = rows // world
        device_rows = training.device_batch_size or per_process
        if per_process % device_rows:
            raise UserError(
                f"--training.device_batch_size is {device_rows}; it must divide the {per_process} rows per process and step"
            )
        return rows, per_process // device_rows

    def _choose_arithmetic(self, processes: PartialState) -> Arithmetic:
        """Measured at the start of a run; a resumed run keeps the choice, or its losses would not be the same."""
        if self.checkpoint is not None:
            state = read_state(self.checkpoint)
            if state.data != self.data_fingerprint:
                raise UserError(
                    f"{self.run_dir} was trained on other token shards than are in "
                    f"{data_folder(self.settings, self.run_dir)} now. Bring those back, or start over with --fresh."
                )
            if state.compiled:
                compile_blocks(self.model)
            return Arithmetic(state.precision, state.compiled, 0.0, "as at the start of the run")
        start = self.order.at_step(Cursor(), 0, self.settings.max_steps or 1)
        data = self.data.read_step(start, self.rows_per_step, self.micro_batches, 0, processes.num_processes)
        batch = data.batches[0].to(processes.device)
        self.model.to(processes.device)
        choice = choose_arithmetic(
            self.model, batch, self.micro_batches, self.settings.training, self.settings.max_steps, self.budget_seconds
        )
        shared = [choice]
        broadcast_object_list(shared)
        return shared[0]


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
