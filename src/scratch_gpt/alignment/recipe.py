"""Common base of the alignment recipes: the run directory, resume, stopping on request, metrics.jsonl, and `final/` with its card.

A recipe is a function that builds a `transformers.Trainer` (TRL's, or ours for PPO) and returns it in a :class:`Recipe`;
:func:`run_recipe` runs it with the same guarantees as `scratch-gpt pretrain`: the run directory is locked and remembers its
settings, checkpoints are complete or absent, and the same command resumes from the newest.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import broadcast_object_list, parse_flag_from_env, set_seed
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import is_bitsandbytes_available

from scratch_gpt import __version__
from scratch_gpt.alignment.models import merge
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.compute.mfu import hardware
from scratch_gpt.config import RecipeTrainingSettings
from scratch_gpt.console import format_duration, print0, progress_bar
from scratch_gpt.distributed.deepspeed import DeepSpeedStrategy, requested_deepspeed_config
from scratch_gpt.distributed.launch import (
    data_parallel_size,
    deepspeed_requested,
    hide_deepspeed,
    hide_sharding,
    launch_state,
    requested_model_parallel_size,
)
from scratch_gpt.distributed.setup import build_model_parallel_strategy
from scratch_gpt.errors import StoppedOnRequest, UserError
from scratch_gpt.files import disk_errors, new_folder, write_json, write_text
from scratch_gpt.training.checkpoint import delete_checkpoint, is_complete, newest_checkpoint
from scratch_gpt.training.metrics import MetricsFile, read_metrics
from scratch_gpt.training.run_directory import CONFIG, record_settings, run_directory, stored_settings
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.trackers import resolve_trackers

NUM_PROGRESS_LINES = 10
"""Number of progress lines that a run prints, besides its evaluations."""
GENERATING_COMMANDS = ("ppo", "grpo", "rloo")
"""Commands whose models generate completions during training."""

Logs = dict[str, Any]


@dataclass
class Recipe:
    """A trainer, and how to report on it."""

    trainer: ResumableTrainerMixin
    describe: Callable[[Logs], str]
    """Formats the logs of a training step, or of an evaluation, as a line of progress."""
    steps_per_rollout: int = 1
    """Optimizer steps on the same completions. Checkpoints and stops wait for the last of them: completions are not saved."""
    report: Callable[[], tuple[dict[str, Any], str]] = lambda: ({}, "")
    """Called at the end on all ranks: returns results for report.json, and Markdown for the card."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the card: the training data, and the rows that were skipped, by name."""


def run_recipe(
    settings: Any,
    command: str,
    build: Callable[[Any, Path], Recipe],
    check: Callable[[Any], None] = lambda settings: None,
) -> None:
    """Run one recipe from its settings to ``final/``. All processes of a launch call it.

    Args:
        settings: The settings of ``command``.
        command: "sft", "dpo", ...
        build: Builds the trainer from the settings and the run directory.
        check: Raises a UserError for mistakes that can be found before models are loaded.
    """
    state = launch_state()
    run_dir = Path(settings.run_dir)
    if not state.is_main_process:
        proceed: list[Any] = [False]
        broadcast_object_list(proceed)
        if proceed[0]:
            _train(settings, command, run_dir, build)
        return
    if (run_dir / CONFIG).is_file() and not any(name.startswith(f"{command}.") for name in stored_settings(run_dir)):
        raise UserError(f"{run_dir} holds a run of another command: choose another --run-dir")
    check_launch(settings, command)
    check(settings)
    with run_directory(settings):
        if (run_dir / "final").is_dir() and stored_settings(run_dir).get("max_steps") == settings.max_steps:
            print0(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
            broadcast_object_list([False])
            return
        record_settings(run_dir, settings)
        broadcast_object_list([True])
        _train(settings, command, run_dir, build)


def check_launch(settings: Any, command: str) -> None:
    """Check that this launch and this machine support the settings.

    Raises:
        UserError: a strategy, an adapter or a tracker is not supported here; the message names an alternative.
    """
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported: use configs/accelerate/ddp.yaml or fsdp2.yaml")
    load_in_4bit = getattr(settings, "load_in_4bit", False)
    if deepspeed_requested() and requested_deepspeed_config()["zero_optimization"]["stage"] == 3 and load_in_4bit:
        raise UserError(
            "zero_stage is 3, and DeepSpeed cannot shard the quantized weights of --load-in-4bit: use "
            "configs/accelerate/zero2.yaml"
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _check_parallelism_config(ParallelismConfig(), command, load_in_4bit)
    offloads = parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    if offloads and command in GENERATING_COMMANDS:
        raise UserError(
            f"fsdp_offload_params is true, and `{command}` would copy the full model from the CPU for each token that it "
            "generates: set it to false, and give --lora-rank if memory is short"
        )
    if load_in_4bit:
        if settings.lora_rank is None:
            raise UserError("--load-in-4bit freezes the weights, so it needs adapters to train: give --lora-rank 16")
        if not is_bitsandbytes_available():
            raise UserError("--load-in-4bit needs the package bitsandbytes: pip install 'scratch-gpt[qlora]'")
    if getattr(settings, "trackers", None):
        resolve_trackers(settings.trackers)


def _check_parallelism_config(sizes: ParallelismConfig, command: str, load_in_4bit: bool) -> None:
    """Raise a UserError for a parallelism_config that this command or this launch does not support."""
    alternatives = "use configs/accelerate/ddp.yaml, or fsdp2.yaml or hsdp.yaml for models that are too large for it"
    uses_fsdp, world_size = parse_flag_from_env("ACCELERATE_USE_FSDP"), launch_state().num_processes
    if sizes.sp_size > 1:
        raise UserError("parallelism_config: DeepSpeed's sequence parallelism (sp_size) is not supported: use cp_size")
    if sizes.cp_size > 1 and not (uses_fsdp and sizes.tp_size == 1):
        raise UserError(
            f"parallelism_config requests context parallelism (cp_size {sizes.cp_size}), which `{command}` supports only "
            "under distributed_type: FSDP and without tp_size: use configs/accelerate/fsdp2_cp.yaml"
        )
    if max(sizes.tp_size, sizes.cp_size) > 1 and load_in_4bit:
        raise UserError(
            f"--load-in-4bit: tensor and context parallelism do not shard quantized weights: {alternatives}"
        )
    if sizes.total_size != world_size:
        raise UserError(
            f"parallelism_config requests {sizes.total_size} processes (dp_replicate_size {sizes.dp_replicate_size} x "
            f"dp_shard_size {sizes.dp_shard_size} x tp_size {sizes.tp_size} x cp_size {sizes.cp_size}), but the launcher "
            f"started {world_size}"
        )
    num_weight_shards = sizes.dp_shard_size * sizes.cp_size if uses_fsdp else 1
    if num_weight_shards == 1 and (sizes.tp_size == 1 or sizes.tp_size < world_size):
        raise UserError(
            "parallelism_config requests replicas, and does not shard the model under distributed_type: FSDP: "
            f"{alternatives}"
        )


def _train(settings: Any, command: str, run_dir: Path, build: Callable[[Any, Path], Recipe]) -> None:
    started = time.monotonic()
    set_seed(settings.seed)  # new heads and adapters are the same in every run and on all ranks
    deepspeed_config = requested_deepspeed_config() if deepspeed_requested() else None
    uses_model_parallel = requested_model_parallel_size() > 1
    try:
        with hide_deepspeed(), hide_sharding() if uses_model_parallel else nullcontext():
            recipe = build(settings, run_dir)
    except ValueError as error:
        raise UserError(str(error)) from error
    trainer = recipe.trainer
    if deepspeed_config is not None:
        trainer.use_deepspeed(DeepSpeedStrategy(trainer.accelerator, deepspeed_config))
    if uses_model_parallel:
        trainer.use_model_parallel(build_model_parallel_strategy(trainer.accelerator))
    checkpoint = newest_checkpoint(run_dir)
    first_step = 0 if checkpoint is None else _step(checkpoint)
    if checkpoint is not None:
        print0(f"resumed    {checkpoint.name}: {first_step:,} of {settings.max_steps:,} steps are done")
    trainer.accelerator.wait_for_everyone()  # all ranks have found the same checkpoint before a newer one is written
    main = trainer.accelerator.is_main_process
    if main:
        _delete_unusable_checkpoints(run_dir, first_step)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    metrics = MetricsFile(run_dir / "metrics.jsonl", first_step, 0, write=main)
    with StopRequest(settings.max_hours) as stop, progress_bar(command, settings.max_steps, first_step) as bar:
        callbacks = trainer.callback_handler.callbacks
        # Right after Trainer's own callback, which decides whether a checkpoint is due.
        callbacks.insert(1, _StopCallback(trainer, stop, recipe.steps_per_rollout))
        trainer.add_callback(_MetricsCallback(metrics, bar.update, recipe))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (ValueError, FloatingPointError) as error:
            raise UserError(str(error)) from error
    step = trainer.state.global_step
    if step < settings.max_steps:
        raise StoppedOnRequest(
            f"stopped after step {step:,} of {settings.max_steps:,}, saved in {run_dir}/checkpoint-{step}. Run the same "
            "command again to resume."
        )
    results, report = recipe.report()
    weights = trainer.full_weights()
    if main:
        duration = format_duration(time.monotonic() - started)
        cost = f"{duration} on {hardware()}" if first_step == 0 else f"resumed at least once, on {hardware()}"
        _save_final(recipe, settings, command, run_dir, weights, results, report, cost)
    trainer.accelerator.wait_for_everyone()


def training_arguments(settings: Any, command: str, run_dir: Path) -> dict[str, Any]:
    """The keyword arguments of `transformers.TrainingArguments` that all recipes take from their settings.

    Raises:
        UserError: the batch cannot be divided over the data-parallel ranks.
    """
    training: RecipeTrainingSettings = getattr(settings, command)
    dp_size = data_parallel_size()
    device_batch_size = training.device_batch_size or max(1, training.batch_size // dp_size)
    accumulation, remainder = divmod(training.batch_size, device_batch_size * dp_size)
    if remainder or not accumulation:
        raise UserError(
            f"--{command}.batch_size is {training.batch_size}; it must be a multiple of {device_batch_size} "
            f"(device_batch_size) x {dp_size} (data-parallel ranks)"
        )
    return {
        "output_dir": str(run_dir),
        "max_steps": settings.max_steps,
        "seed": settings.seed,
        "per_device_train_batch_size": device_batch_size,
        "per_device_eval_batch_size": device_batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bf16",
        "activation_checkpointing": training.activation_checkpointing,
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": training.eval_every,
        "save_steps": training.save_every,
        "save_total_limit": training.keep_last,
        "report_to": settings.trackers,
        "disable_tqdm": True,
        "use_cpu": launch_state().device.type == "cpu",
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": launch_state().device.type == "cuda",
    }


def peft_config(settings: Any, task_type: str) -> Any:
    """Return the LoRA configuration, or None if all weights are trained. ``task_type``: "CAUSAL_LM" or "SEQ_CLS"."""
    if settings.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type=task_type
    )


def describe_model(settings: Any, model: Any) -> None:
    """Print the model's name and how many of its parameters are trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print0(f"model      {settings.model}: {total:,} parameters, {trained:,} of them trained")


# ------------------------------------------------------------------------------------------------ callbacks


class _StopCallback(TrainerCallback):
    """Save and stop at the end of a rollout once any rank was asked to; a due checkpoint waits for that end, too."""

    def __init__(self, trainer: ResumableTrainerMixin, stop: StopRequest, steps_per_rollout: int):
        self.trainer, self.stop, self.steps_per_rollout = trainer, stop, steps_per_rollout
        self.save_pending = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        self.save_pending |= control.should_save or is_last
        at_rollout_end = state.global_step % self.steps_per_rollout == 0 or is_last
        control.should_save = self.save_pending and at_rollout_end
        if at_rollout_end:
            self.save_pending = False
            requests = torch.tensor(float(self.stop.requested), device=args.device)
            if self.trainer.accelerator.reduce(requests, "sum") > 0:
                control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save  # else the next entry of a resumed run would average fewer steps
        return control


class _MetricsCallback(TrainerCallback):
    """Write metrics.jsonl and print progress.

    Raises:
        FloatingPointError: the loss or the gradient's norm is not finite.
    """

    def __init__(self, file: MetricsFile, update_bar: Callable[[int, str], None], recipe: Recipe):
        self.file, self.update_bar, self.recipe = file, update_bar, recipe
        self.last_tokens, self.last_time = 0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_tokens, self.last_time = int(state.num_input_tokens_seen), time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_time = time.perf_counter()  # so that tokens_per_second is that of training

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return
        for name in ("num_tokens", "eval_num_tokens"):  # TRL counts from the last resume only
            logs.pop(name, None)
        step = state.global_step
        if "loss" in logs:
            tokens, now = int(state.num_input_tokens_seen), time.perf_counter()
            tokens_per_second = (tokens - self.last_tokens) / (now - self.last_time)
            logs |= {"tokens": tokens, "tokens_per_second": round(tokens_per_second, 1)}
            self.last_tokens, self.last_time = tokens, now
            if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
                raise FloatingPointError(
                    f"step {step:,}: the loss is {logs['loss']}, its gradient's norm {logs.get('grad_norm')}. Earlier "
                    "checkpoints are good: start over with --fresh and a lower learning rate"
                )
            self.update_bar(step, f"step {step}/{state.max_steps} {self.recipe.describe(logs)}")
        finite = {n: v if not isinstance(v, float) or math.isfinite(v) else None for n, v in logs.items()}
        self.file.write({"step": step, **finite, "time": round(time.time(), 3)})
        rollout = step // self.recipe.steps_per_rollout
        num_rollouts = state.max_steps // self.recipe.steps_per_rollout
        print_every = max(1, num_rollouts // NUM_PROGRESS_LINES)
        if "loss" not in logs or rollout % print_every == 0 or rollout == 1:
            print0(f"  step {step:>5,}  {self.recipe.describe(logs)}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _delete_unusable_checkpoints(run_dir: Path, step: int) -> None:
    """Delete incomplete checkpoints and those after ``step``: Trainer would write into their folders."""
    for folder in run_dir.glob("checkpoint-*"):
        if _step(folder) > step or not is_complete(folder):
            delete_checkpoint(folder)


# ------------------------------------------------------------------------------------------------ final/


def _save_final(
    recipe: Recipe,
    settings: Any,
    command: str,
    run_dir: Path,
    weights: dict[str, torch.Tensor] | None,
    results: dict[str, Any],
    report: str,
    cost: str,
) -> None:
    """Save final/ with its card, report.json if there are results, and adapters/ if they are merged into final/."""
    target, trainer = run_dir / "final", recipe.trainer
    merges_adapters = settings.lora_rank is not None and settings.merge_adapters
    with disk_errors(f"{target} (the checkpoints are untouched)"):
        if merges_adapters:
            with new_folder(run_dir / "adapters") as folder:
                trainer.write_output_model(folder, weights)
        if results:
            write_json(run_dir / "report.json", results)
        with new_folder(target) as folder:
            if merges_adapters:
                merge(trainer.output_model, settings.model, run_dir / "adapters").save_pretrained(folder)
                trainer.processing_class.save_pretrained(folder)
            else:
                trainer.write_output_model(folder, weights)
            card = _model_card(recipe, settings, command, read_metrics(run_dir / "metrics.jsonl"), report, cost)
            write_text(folder / "README.md", card)
    print0(f"saved      {target}")


def _model_card(recipe: Recipe, settings: Any, command: str, records: list[Logs], report: str, cost: str) -> str:
    """The card of final/, from measured numbers only."""
    from huggingface_hub import ModelCardData

    pipeline = "text-classification" if command == "reward" else "text-generation"
    data = ModelCardData(library_name="transformers", pipeline_tag=pipeline, tags=[command, "custom_code"])
    lines = ["---", data.to_yaml(), "---", f"# {Path(settings.model).name}, after {command}", ""]
    lines += [f"`{settings.model}`, trained further by `scratch-gpt {command}` {__version__}.", ""]
    lines += [f"- {name}: {value}" for name, value in recipe.facts.items()]
    evaluations = [record for record in records if "loss" not in record]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines += ["", f"Evaluated at step {first['step']:,}: {recipe.describe(first)}"]
        lines += [f"and at step {last['step']:,}: {recipe.describe(last)}."]
    lines += ["", report] if report else []
    lines += ["", f"{settings.max_steps:,} optimizer steps, seed {settings.seed}, {cost}.", ""]
    return "\n".join(lines)
