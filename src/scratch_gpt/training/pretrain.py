"""Pretrain a model: text to tokenizer to token shards to checkpoints to ``final/``.

    scratch-gpt pretrain --run-dir runs/mine --corpus book.txt --max-steps 1000
    accelerate launch --num_processes 8 -m scratch_gpt pretrain --config pretrain.yaml

This file prepares what the run directory does not have yet, builds the run (``build.py``), trains (``trainer.py``), and
writes the final model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scratch_gpt.compute.precision import check_precision
from scratch_gpt.config import PretrainSettings
from scratch_gpt.console import print0
from scratch_gpt.data.prepare import prepare, summary
from scratch_gpt.data.shards import read_manifest
from scratch_gpt.data.sources import split_documents
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer, save_tokenizer, train_tokenizer
from scratch_gpt.distributed.launch import launch_state, shutdown
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.optimizer import describe as describe_groups
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, new_folder
from scratch_gpt.training.build import Pretraining, build, data_folder, tokenizer_folder
from scratch_gpt.training.checkpoint import save_model, unsharded_model, weight_tensors
from scratch_gpt.training.lr_schedule import learning_rate
from scratch_gpt.training.metrics import read_events
from scratch_gpt.training.monitor import check_monitoring
from scratch_gpt.training.out_of_memory import is_out_of_memory, out_of_memory_advice
from scratch_gpt.training.run_directory import has_trained, record_settings, run_directory, stored_settings
from scratch_gpt.training.spike_guard import summarize_events
from scratch_gpt.training.trainer import TrainerCallback


def pretrain_command(settings: PretrainSettings) -> None:
    """`scratch-gpt pretrain`."""
    pretrain(settings)


def pretrain(settings: PretrainSettings, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train the run of ``settings``, from its newest checkpoint if it has one; all processes of a launch call it.

    Raises:
        UserError: the settings do not fit the machine or the run directory, or the run cannot continue.
        StoppedOnRequest: a signal came, or the time is up; a checkpoint was saved.
    """
    state = launch_state(settings.parallel.timeout)
    check_monitoring(settings, state.device)
    check_precision(settings.training.precision, state.device)
    # The main process prepares the run directory and holds its lock; the others wait until it is ready.
    if state.is_main_process:
        with run_directory(settings) as run_dir:
            if (run_dir / "final").is_dir() and stored_settings(run_dir).get("max_steps") == settings.max_steps:
                print0(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
                return
            if not (settings.dry_run and has_trained(run_dir)):
                record_settings(run_dir, settings)
            prepare_tokenizer(settings, run_dir)
            prepare_data(settings, run_dir)
            state.wait_for_everyone()
            build_and_train(settings, run_dir, callbacks)
    else:
        state.wait_for_everyone()
        build_and_train(settings, Path(settings.run_dir), callbacks)


def build_and_train(settings: PretrainSettings, run_dir: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
    try:
        run = build(settings, run_dir)
        if settings.dry_run:
            describe(run)
        else:
            train(run, callbacks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory_advice(error, settings)) from error


# ------------------------------------------------------------------------------------------------ prepare


def prepare_tokenizer(settings: PretrainSettings, run_dir: Path) -> None:
    """Train the tokenizer, unless the run directory has it or `--tokenizer-path` names one."""
    path = tokenizer_folder(settings, run_dir)
    if settings.tokenizer_path is None and not path.is_dir():
        train_documents, _, _ = split_documents(settings)
        tokenizer = train_tokenizer(train_documents, settings.tokenizer)
        with disk_errors(str(path)), new_folder(path) as folder:
            save_tokenizer(tokenizer, folder)
    print0(f"tokenizer  {len(load_tokenizer(path)):,} tokens in {path}")


def prepare_data(settings: PretrainSettings, run_dir: Path) -> None:
    """Encode the text into token shards, unless the run directory has them or `--data-path` names some."""
    tokenizer_path = tokenizer_folder(settings, run_dir)
    if settings.data_path is None:
        manifest = prepare(settings, tokenizer_path, data_folder(settings, run_dir))
    else:
        manifest = read_manifest(Path(settings.data_path))
        if manifest["tokenizer"] != fingerprint(tokenizer_path):
            raise UserError(f"{settings.data_path} was made with another tokenizer than {tokenizer_path}")
    print0(f"data       {summary(manifest)}")


# ------------------------------------------------------------------------------------------------ train


def train(run: Pretraining, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train to the last step and write ``final/``; :meth:`Trainer.run` lists what may end it before."""
    trainer = run.build_trainer(callbacks)
    with trainer.watchdog as watchdog:
        trainer.run()
        epochs = run.data.train.order.epochs(trainer.state.data_position)
        print0(f"data read  {', '.join(f'{source} {count:.2f} times' for source, count in epochs.items())}")
        if guard_summary := summarize_events(read_events(run.run_dir / "metrics.jsonl")):
            print0(f"guard      {guard_summary}")
        watchdog.heartbeat("writing the final model")
        save_final_model(run.strategy, run.model, run.tokenizer, run.run_dir)
        watchdog.stop()
        shutdown(run.strategy.accelerator)


def save_final_model(strategy: Strategy, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write the model to ``run_dir/final`` as a Hugging Face model folder."""
    target = run_dir / "final"
    weights = strategy.gather_full(weight_tensors(model))
    if strategy.is_main_process:
        with disk_errors(f"{target} (the checkpoints are untouched)"), new_folder(target) as folder:
            save_model(unsharded_model(model), weights, tokenizer, folder)
        print0(f"saved      {target}")
    strategy.accelerator.wait_for_everyone()


def describe(run: Pretraining) -> None:
    """Print what `--dry-run` adds to the lines of every run: optimizer groups, and the schedule at a few steps."""
    training, max_steps, context_length = run.settings.training, run.settings.max_steps, run.data.train.context_length
    for number, line in enumerate(describe_groups(build_optimizer(run.model, training))):
        print0(("optimizer  " if number == 0 else "           ") + line)
    print0(f"schedule   {training.schedule} over {max_steps:,} steps:")
    for step in sorted({0, training.warmup_steps, max_steps // 4, max_steps // 2, 3 * max_steps // 4, max_steps - 1}):
        if 0 <= step < max_steps:
            sequences, micro_batches = run.data.batch_sizes.at(step, training)
            print0(
                f"           step {step + 1:>7,}  learning rate {learning_rate(step, max_steps, training):.2e}  "
                f"{sequences * context_length:>9,} tokens in {micro_batches} forward pass(es) per process"
            )
    print0("dry run: nothing was trained")
