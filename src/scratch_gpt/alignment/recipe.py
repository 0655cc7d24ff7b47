"""What every stage's run is beside its trainer: a run directory that the same command goes on in, or leaves alone.

A stage is one function that puts a `transformers.Trainer` together (TRL's, or one of ours) and one that says what came of
it. Around them, here: the directory's lock and settings, checkpoints that are complete or absent, the way back into them,
stopping on request, metrics.jsonl, `final/` with its card. All of it as `scratch-gpt pretrain` does it.
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

TOLD = 10
"""Lines of progress in a run."""
GENERATING = ("ppo", "grpo", "rloo")
"""Stages whose models draw completions."""

Logs = dict[str, Any]


@dataclass
class Recipe:
    """A trainer, and how to tell of it."""

    trainer: ResumableTrainerMixin
    describe: Callable[[Logs], str]
    """One line of progress from what was logged; the same function is given the logs of an evaluation."""
    steps_per_rollout: int = 1
    """Checkpoints and stops wait until so many steps are done: what was drawn for them is not saved."""
    report: Callable[[], tuple[dict[str, Any], str]] = lambda: ({}, "")
    """At the end, on all processes: results for report.json, and lines in Markdown for the card."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the card: what was learnt from, and what was left out of it."""


def run_recipe(
    settings: Any, verb: str, build: Callable[[Any, Path], Recipe], check: Callable[[Any], None] = lambda settings: None
) -> None:
    """A stage from its settings to ``final/``. All processes of a launch call it.

    ``check`` raises a UserError for what can be known before models are loaded; ``build`` puts the trainer together.
    """
    state = launch_state()
    run_dir = Path(settings.run_dir)
    if not state.is_main_process:
        told: list[Any] = [False]
        broadcast_object_list(told)
        if told[0]:
            _train(settings, verb, run_dir, build)
        return
    if (run_dir / CONFIG).is_file() and not any(name.startswith(f"{verb}.") for name in stored_settings(run_dir)):
        raise UserError(f"{run_dir} holds a run of another verb: choose another --run-dir")
    check_launch(settings, verb)
    check(settings)
    with run_directory(settings):
        if (run_dir / "final").is_dir() and stored_settings(run_dir).get("max_steps") == settings.max_steps:
            print0(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
            broadcast_object_list([False])
            return
        record_settings(run_dir, settings)
        broadcast_object_list([True])
        _train(settings, verb, run_dir, build)


def check_launch(settings: Any, verb: str) -> None:
    """Raises a UserError for layouts and adapters that this launch or machine does not allow."""
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported: take configs/accelerate/ddp.yaml or fsdp2.yaml")
    if deepspeed_requested():
        stage = requested_deepspeed_config()["zero_optimization"]["stage"]
        if stage == 3 and getattr(settings, "load_in_4bit", False):
            raise UserError(
                "zero_stage is 3, and --load-in-4bit packs weights in a form that DeepSpeed does not cut: take "
                "configs/accelerate/zero2.yaml"
            )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _check_sizes(ParallelismConfig(), settings, verb)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_OFFLOAD_PARAMS") and verb in GENERATING:
        raise UserError(
            f"fsdp_offload_params is true, and `{verb}` would fetch the whole model for each token that it draws: set it to "
            "false, and give --lora-rank where memory is short"
        )
    if getattr(settings, "load_in_4bit", False):
        if settings.lora_rank is None:
            raise UserError("--load-in-4bit holds frozen weights, so it needs adapters to train: give --lora-rank 16")
        if not is_bitsandbytes_available():
            raise UserError("--load-in-4bit needs the package bitsandbytes: pip install 'scratch-gpt[qlora]'")
    if getattr(settings, "trackers", None):
        resolve_trackers(settings.trackers)


def _check_sizes(sizes: ParallelismConfig, settings: Any, verb: str) -> None:
    """Raises a UserError for a parallelism_config that this stage or this launch does not carry out."""
    instead = "take configs/accelerate/ddp.yaml, or fsdp2.yaml or hsdp.yaml for models that are too large for it"
    sharded, world = parse_flag_from_env("ACCELERATE_USE_FSDP"), launch_state().num_processes
    if sizes.sp_size > 1:
        raise UserError("parallelism_config: DeepSpeed's sequence parallelism (sp_size) is not supported: take cp_size")
    if sizes.cp_size > 1 and not (sharded and sizes.tp_size == 1):
        raise UserError(
            f"parallelism_config divides the columns of rows (cp_size {sizes.cp_size}), which `{verb}` does under "
            "distributed_type: FSDP and without tp_size: take configs/accelerate/fsdp2_cp.yaml"
        )
    if max(sizes.tp_size, sizes.cp_size) > 1 and getattr(settings, "load_in_4bit", False):
        raise UserError(f"--load-in-4bit: tensor and context parallelism do not divide packed weights: {instead}")
    if sizes.total_size != world:
        raise UserError(
            f"parallelism_config asks for {sizes.total_size} processes ({sizes.dp_replicate_size} copies in "
            f"{sizes.dp_shard_size} parts, each over {sizes.tp_size * sizes.cp_size}), the launcher started {world}"
        )
    parts = sizes.dp_shard_size * sizes.cp_size if sharded else 1
    if parts == 1 and (sizes.tp_size == 1 or sizes.tp_size < world):
        raise UserError(f"parallelism_config asks for copies, and for no parts under distributed_type: FSDP: {instead}")


def _train(settings: Any, verb: str, run_dir: Path, build: Callable[[Any, Path], Recipe]) -> None:
    started = time.monotonic()
    set_seed(settings.seed)  # new heads and adapters are the same each time and on all processes
    zero = requested_deepspeed_config() if deepspeed_requested() else None
    shared = requested_model_parallel_size() > 1
    try:
        with hide_deepspeed(), hide_sharding() if shared else nullcontext():
            stage = build(settings, run_dir)
    except ValueError as error:
        raise UserError(str(error)) from error
    trainer = stage.trainer
    if zero is not None:
        trainer.use_deepspeed(DeepSpeedStrategy(trainer.accelerator, zero))
    if shared:
        trainer.use_model_parallel(build_model_parallel_strategy(trainer.accelerator))
    checkpoint = newest_checkpoint(run_dir)
    done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    if checkpoint is not None:
        print0(f"resumed    {checkpoint.name}: {done:,} of {settings.max_steps:,} steps are done")
    # The processes agree on the checkpoint before the first of them can write another.
    trainer.accelerator.wait_for_everyone()
    main = trainer.accelerator.is_main_process
    if main:
        _forget_after(run_dir, done)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    metrics = MetricsFile(run_dir / "metrics.jsonl", done, 0, write=main)
    with StopRequest(settings.max_hours) as stop, progress_bar(verb, settings.max_steps, done) as bar:
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(
            1, _StopCallback(trainer, stop, stage.steps_per_rollout)
        )  # behind the one that decides what is due
        trainer.add_callback(_MetricsCallback(metrics, bar.update, stage))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (ValueError, FloatingPointError) as error:
            raise UserError(str(error)) from error
    step = trainer.state.global_step
    if step < settings.max_steps:
        raise StoppedOnRequest(
            f"stopped after step {step:,} of {settings.max_steps:,}, saved in {run_dir}/checkpoint-{step}. The same command "
            "goes on from there."
        )
    results, lines = stage.report()
    weights = trainer.full_weights()
    if main:
        seconds = time.monotonic() - started
        spent = f"{format_duration(seconds)} on {hardware()}" if done == 0 else f"in several sittings on {hardware()}"
        _save_final(stage, settings, verb, run_dir, weights, results, lines, spent)
    trainer.accelerator.wait_for_everyone()


def training_arguments(settings: Any, verb: str, run_dir: Path) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`, what the settings of a stage say.

    Raises:
        UserError: a batch that cannot be divided over the processes.
    """
    training: RecipeTrainingSettings = getattr(settings, verb)
    world = data_parallel_size()
    device_batch_size = training.device_batch_size or max(1, training.batch_size // world)
    accumulation, remainder = divmod(training.batch_size, device_batch_size * world)
    if remainder or not accumulation:
        raise UserError(
            f"--{verb}.batch_size is {training.batch_size}; it must be a multiple of {device_batch_size} (device_batch_size) x "
            f"{world} (processes that read rows of their own)"
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
    """PEFT's configuration, or None where all weights are trained."""
    if settings.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type=task_type
    )


# ------------------------------------------------------------------------------------------------ while it runs


class _StopCallback(TrainerCallback):
    """Ends the run, saved, at the end of a rollout once any process was asked to; a save that is due waits for that end."""

    def __init__(self, trainer: ResumableTrainerMixin, stop: StopRequest, steps_per_rollout: int):
        self.trainer, self.stop, self.steps_per_rollout, self.pending = trainer, stop, steps_per_rollout, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        self.pending |= control.should_save or last
        at_end = state.global_step % self.steps_per_rollout == 0 or last
        control.should_save = self.pending and at_end
        if at_end:
            self.pending = False
            votes = torch.tensor(float(self.stop.requested), device=args.device)
            if self.trainer.accelerator.reduce(votes, "sum") > 0:
                control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save  # or the next entry would be of fewer steps in a resumed run
        return control


class _MetricsCallback(TrainerCallback):
    """metrics.jsonl and the console."""

    def __init__(self, file: MetricsFile, update_bar: Callable[[int, str], None], stage: Recipe):
        self.file, self.update_bar, self.stage = file, update_bar, stage
        self.tokens, self.clock = 0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens, self.clock = int(state.num_input_tokens_seen), time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock = time.perf_counter()

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
        for name in ("num_tokens", "eval_num_tokens"):  # of this sitting
            logs.pop(name, None)
        step = state.global_step
        if "loss" in logs:
            tokens, now = int(state.num_input_tokens_seen), time.perf_counter()
            logs |= {"tokens": tokens, "tokens_per_second": round((tokens - self.tokens) / (now - self.clock), 1)}
            self.tokens, self.clock = tokens, now
            if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
                raise FloatingPointError(
                    f"step {step:,}: the loss is {logs['loss']}, its gradient's norm {logs.get('grad_norm')}. The checkpoints "
                    "before it are good: start over with --fresh and a lower learning rate"
                )
            self.update_bar(step, f"step {step}/{state.max_steps} {self.stage.describe(logs)}")
        finite = {n: v if not isinstance(v, float) or math.isfinite(v) else None for n, v in logs.items()}
        self.file.write({"step": step, **finite, "time": round(time.time(), 3)})
        rollout, rollouts = step // self.stage.steps_per_rollout, state.max_steps // self.stage.steps_per_rollout
        tenth = max(1, rollouts // TOLD)
        if "loss" not in logs or rollout % tenth == 0 or rollout == 1:
            print0(f"  step {step:>5,}  {self.stage.describe(logs)}")


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _forget_after(run_dir: Path, step: int) -> None:
    """Delete checkpoints that the run does not go on from: Trainer would write into them."""
    for folder in run_dir.glob("checkpoint-*"):
        if _step(folder) > step or not is_complete(folder):
            delete_checkpoint(folder)


# ------------------------------------------------------------------------------------------------ the end


def _save_final(
    stage: Recipe,
    settings: Any,
    verb: str,
    run_dir: Path,
    weights: dict[str, torch.Tensor] | None,
    results: dict[str, Any],
    lines: str,
    spent: str,
) -> None:
    target, trainer = run_dir / "final", stage.trainer
    merged = settings.lora_rank is not None and settings.merge_adapters
    with disk_errors(f"{target} (the checkpoints are untouched)"):
        if merged:
            with new_folder(run_dir / "adapters") as folder:
                trainer.write_result(folder, weights)
        if results:
            write_json(run_dir / "report.json", results)
        with new_folder(target) as folder:
            if merged:
                merge(trainer.result, settings.model, run_dir / "adapters").save_pretrained(folder)
                trainer.processing_class.save_pretrained(folder)
            else:
                trainer.write_result(folder, weights)
            card = _card(stage, settings, verb, read_metrics(run_dir / "metrics.jsonl"), lines, spent)
            write_text(folder / "README.md", card)
    print0(f"saved      {target}")


def _card(stage: Recipe, settings: Any, verb: str, records: list[Logs], lines: str, spent: str) -> str:
    """Measured numbers only."""
    from huggingface_hub import ModelCardData

    pipeline = "text-classification" if verb == "reward" else "text-generation"
    data = ModelCardData(library_name="transformers", pipeline_tag=pipeline, tags=[verb, "custom_code"])
    parts = ["---", data.to_yaml(), "---", f"# {Path(settings.model).name}, after {verb}", ""]
    parts += [f"`{settings.model}`, trained further by `scratch-gpt {verb}` {__version__}.", ""]
    parts += [f"- {name}: {value}" for name, value in stage.facts.items()]
    validated = [record for record in records if "loss" not in record]
    if validated:
        parts += ["", f"Validated at step {validated[0]['step']:,}: {stage.describe(validated[0])}"]
        parts += [f"and at step {validated[-1]['step']:,}: {stage.describe(validated[-1])}."]
    parts += ["", lines] if lines else []
    parts += ["", f"{settings.max_steps:,} optimizer steps, seed {settings.seed}, {spent}.", ""]
    return "\n".join(parts)


def describe_model(settings: Any, model: Any) -> None:
    """Say what is trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    print0(f"model      {settings.model}: {every:,} parameters, {trained:,} of them trained")
