"""PPO from the command line: a model, prompts and a reward to checkpoints to ``final/``.

    scratch-gpt ppo --model runs/sft/final --reward-model runs/reward/final --prompts prompts.jsonl --run-dir runs/ppo
    accelerate launch --num_processes 8 -m scratch_gpt ppo --config ppo.yaml

The learning itself is in ``ppo_trainer.py``.
"""

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scratch_gpt import __version__
from scratch_gpt.alignment.ppo_config import PPOConfig
from scratch_gpt.alignment.ppo_trainer import PPO_STATE, PPOTrainer
from scratch_gpt.alignment.scoring import RewardError
from scratch_gpt.config import PPOSettings
from scratch_gpt.console import duration, progress_bar, say
from scratch_gpt.errors import StoppedOnRequest, UserError
from scratch_gpt.files import disk_errors, new_folder, write_text
from scratch_gpt.training.build import load_model
from scratch_gpt.training.launch import launched_processes
from scratch_gpt.training.metrics import MetricsFile, read_metrics
from scratch_gpt.training.run import CONFIG, record_settings, run_directory, stored_settings
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.utilisation import hardware

TOLD = 10
"""Lines of progress in a run."""


def ppo_command(settings: PPOSettings) -> None:
    """`scratch-gpt ppo`."""
    state = launched_processes()
    run_dir = Path(settings.run_dir)
    if not state.is_main_process:
        _train_if_told(settings, run_dir)
        return
    _refuse_another_verbs_run(run_dir)
    _check(settings)
    with run_directory(settings):
        stored = stored_settings(run_dir).get("max_steps")
        if (run_dir / "final").is_dir() and stored == settings.max_steps:
            say(f"{run_dir}/final is finished ({settings.max_steps:,} steps). --fresh starts over.")
            broadcast_object_list([False])
            return
        record_settings(run_dir, settings)
        broadcast_object_list([True])
        _train(settings, run_dir)


def _train_if_told(settings: PPOSettings, run_dir: Path) -> None:
    """What the other processes do while the first looks at the run directory."""
    told = [False]
    broadcast_object_list(told)
    if told[0]:
        _train(settings, run_dir)


def _check(settings: PPOSettings) -> None:
    """Raises one UserError with all that is wrong and can be known before models are loaded."""
    problems = []
    if (settings.reward_model is None) == (settings.reward is None):
        problems.append("give one of --reward-model FOLDER and --reward MODULE:FUNCTION")
    per_rollout = settings.ppo.epochs * settings.ppo.mini_batches
    if settings.max_steps % per_rollout:
        nearest = max(1, round(settings.max_steps / per_rollout)) * per_rollout
        problems.append(
            f"--max-steps is {settings.max_steps}; a rollout takes {per_rollout} steps (ppo.epochs x ppo.mini_batches), so "
            f"give a multiple of that, such as {nearest}"
        )
    world = launched_processes().num_processes
    rows, remainder = divmod(settings.ppo.mini_batch_size, world * (settings.ppo.device_batch_size or 1))
    if remainder or not rows:
        problems.append(
            f"--ppo.mini_batch_size is {settings.ppo.mini_batch_size}; it must be a multiple of "
            f"{settings.ppo.device_batch_size or 1} (device_batch_size) x {world} (processes)"
        )
    if problems:
        raise UserError("\n".join(problems))


def _refuse_another_verbs_run(run_dir: Path) -> None:
    if (run_dir / CONFIG).is_file() and not any(name.startswith("ppo.") for name in stored_settings(run_dir)):
        raise UserError(f"{run_dir} holds a run of another verb: choose another --run-dir")


def _train(settings: PPOSettings, run_dir: Path) -> None:
    started = time.monotonic()
    trainer = build_trainer(settings, run_dir)
    checkpoint = newest_checkpoint(run_dir)
    done = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    if checkpoint is not None:
        say(f"resumed    {checkpoint.name}: {done:,} of {settings.max_steps:,} steps are done")
    # The processes agree on the checkpoint before the first of them can write another.
    trainer.accelerator.wait_for_everyone()
    main = trainer.accelerator.is_main_process
    with StopRequest(settings.max_hours) as stop, progress_bar("ppo", settings.max_steps, done) as bar:
        trainer.callback_handler.callbacks.insert(1, _Stop(trainer, stop))
        trainer.add_callback(_Metrics(MetricsFile(run_dir / "metrics.jsonl", done, 0, write=main), bar.update))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (RewardError, FloatingPointError) as error:
            raise UserError(str(error)) from error
    step = trainer.state.global_step
    if step < settings.max_steps:
        raise StoppedOnRequest(
            f"stopped after step {step:,} of {settings.max_steps:,}, saved in {run_dir}/checkpoint-{step}. The same command "
            "goes on from there."
        )
    if main:
        _save_final(trainer, settings, run_dir, time.monotonic() - started, whole=done == 0)
    trainer.accelerator.wait_for_everyone()


def build_trainer(settings: PPOSettings, run_dir: Path) -> PPOTrainer:
    """Models, data and settings put together.

    Raises:
        UserError: they do not fit; the message says which, and the mend.
    """
    model, tokenizer = load_model(settings.model)
    ppo = settings.ppo
    per_process = ppo.mini_batch_size // launched_processes().num_processes
    device_batch_size = ppo.device_batch_size or per_process
    peft_config = None
    if settings.lora_rank is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    validation = None if settings.validation_prompts is None else read_prompts(settings.validation_prompts)
    evaluation: dict[str, Any] = (
        {"eval_strategy": "steps", "eval_steps": ppo.eval_every} if validation is not None else {}
    )
    passed_on = [
        "learning_rate",
        "warmup_steps",
        "max_grad_norm",
        "activation_checkpointing",
        "max_prompt_length",
        "max_completion_length",
        "temperature",
        "stop_tokens",
        "kl_coef",
        "kl_estimator",
        "adaptive_kl_target",
        "adaptive_kl_horizon",
        "gamma",
        "lam",
        "cliprange",
        "cliprange_value",
        "vf_coef",
        "whiten_rewards",
        "score_normalization",
        "score_clip",
        "missing_eos_penalty",
        "target_kl",
    ]
    try:
        trainer = PPOTrainer(
            model,
            _reward(settings),
            PPOConfig(
                output_dir=str(run_dir),
                per_device_train_batch_size=device_batch_size,
                gradient_accumulation_steps=per_process // device_batch_size,
                num_mini_batches=ppo.mini_batches,
                num_ppo_epochs=ppo.epochs,
                max_steps=settings.max_steps,
                save_steps=ppo.save_every,
                save_total_limit=ppo.keep_last,
                bf16=ppo.precision == "bf16",
                seed=settings.seed,
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                **evaluation,
                **{name: getattr(ppo, name) for name in passed_on},
            ),
            train_dataset=read_prompts(settings.prompts),
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    trainer.remove_callback(PrinterCallback)
    trainable = sum(p.numel() for p in trainer.model.policy.parameters() if p.requires_grad)
    say(f"model      {settings.model}: {model.num_parameters():,} parameters, {trainable:,} of them trained")
    say(f"reward     {settings.reward_model or settings.reward}")
    rows = ppo.mini_batch_size * ppo.mini_batches
    say(
        f"prompts    {len(trainer.train_dataset):,}; {rows:,} completions a rollout, "
        f"{settings.max_steps // trainer.args.steps_per_rollout:,} rollouts"
    )
    return trainer


def read_prompts(path: str) -> Dataset:
    """JSON Lines with a field `prompt`.

    Raises:
        UserError: no such file, or a line that is not such an object; the message names file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no file {path}: give prompts as JSON Lines, one object with a field prompt a line")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or "prompt" not in row:
            found = f"it has {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(f"{path}, line {number}: not an object with a field prompt ({found})")
        prompt = row["prompt"]
        messages = isinstance(prompt, list) and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
        )
        if not prompt or not (isinstance(prompt, str) or messages):
            raise UserError(f"{path}, line {number}: prompt is neither text nor messages with role and content")
        if rows and isinstance(prompt, str) != isinstance(rows[0]["prompt"], str):
            raise UserError(f"{path}, line {number}: text and messages are mixed")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return Dataset.from_list(rows)


def _reward(settings: PPOSettings) -> str | Callable[..., Any]:
    """The reward model's folder, or the function.

    Raises:
        UserError: there is none.
    """
    if settings.reward_model is not None:
        if not (Path(settings.reward_model) / "config.json").is_file():
            raise UserError(f"--reward-model: {settings.reward_model} holds no model (no config.json)")
        return settings.reward_model
    assert settings.reward is not None
    module_name, _, name = settings.reward.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name) if module_name and name else None
    except ImportError as error:
        raise UserError(f"--reward {settings.reward}: cannot import {module_name} here ({error})") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"--reward {settings.reward}: give MODULE:FUNCTION, such as rewards:politeness of a rewards.py here"
        )
    return function


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest that was written to its end; Trainer writes its state last."""
    found = [folder for folder in run_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    for folder in sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            say(f"{folder.name} was not finished and is left out")
            continue
        if (folder / PPO_STATE).is_file():
            return folder
    return None


class _Stop(TrainerCallback):
    """Ends the run, saved, at the end of a rollout once any process was asked to."""

    def __init__(self, trainer: PPOTrainer, stop: StopRequest):
        self.trainer, self.stop = trainer, stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step % args.steps_per_rollout == 0:
            votes = torch.tensor(float(self.stop.requested), device=args.device)
            if self.trainer.accelerator.reduce(votes, "sum") > 0:
                control.should_save = control.should_training_stop = True
        return control


class _Metrics(TrainerCallback):
    """metrics.jsonl and the console."""

    def __init__(self, file: MetricsFile, update_bar: Callable[[int, str], None]):
        self.file, self.update_bar = file, update_bar

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        step, logs = state.global_step, logs or {}
        if "train_runtime" in logs:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in logs.items()}
        self.file.write({"step": step, **finite, "time": round(time.time(), 3)})
        if "loss" in logs:
            self.update_bar(step, f"step {step}/{state.max_steps} score {logs['objective/scores']:.3f}")
        rollout = step // args.steps_per_rollout
        tenth = max(1, state.max_steps // args.steps_per_rollout // TOLD)
        if "eval_objective/scores" in logs or rollout % tenth == 0 or rollout == 1:
            say(f"  step {step:>5,}  {describe(logs)}")


def describe(record: dict[str, Any]) -> str:
    """Score beside what it may have cost: divergence, length, completions that do not end."""
    kind = "eval_" if "eval_objective/scores" in record else ""
    return (
        f"{'validation ' if kind else ''}score {record[f'{kind}objective/scores']:.3f}  "
        f"KL {record[f'{kind}objective/kl']:.2f} nats  "
        f"length {record[f'{kind}completions/mean_length']:.1f}  ended {record[f'{kind}completions/eos_share']:.0%}"
    )


def _save_final(trainer: PPOTrainer, settings: PPOSettings, run_dir: Path, seconds: float, whole: bool) -> None:
    target = run_dir / "final"
    policy = trainer.model.policy
    if settings.lora_rank is not None and settings.merge_adapters:
        policy = policy.merge_and_unload()
    with disk_errors(f"{target} (the checkpoints are untouched)"), new_folder(target) as folder:
        policy.save_pretrained(folder)
        trainer.tokenizer.save_pretrained(folder)
        spent = f"{duration(seconds)} on {hardware()}" if whole else f"in several sittings on {hardware()}"
        write_text(folder / "README.md", _card(settings, read_metrics(run_dir / "metrics.jsonl"), spent))
    say(f"saved      {target}")


def _card(settings: PPOSettings, records: list[dict[str, Any]], spent: str) -> str:
    """Measured numbers only: the first and the last entry of the metrics."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["ppo", "custom_code"])
    training = [record for record in records if "loss" in record]
    lines = ["---", data.to_yaml(), "---", f"# PPO on {Path(settings.model).name}", ""]
    lines += [f"`{settings.model}`, trained by `scratch-gpt ppo` {__version__} with the reward of", ""]
    lines += [f"`{settings.reward_model or settings.reward}`, on completions it drew for `{settings.prompts}`.", ""]
    lines += ["| | first rollouts | last rollouts |", "|---|---|---|"]
    shown = {
        "score": "objective/scores",
        "KL divergence from the start (nats per completion)": "objective/kl",
        "length (tokens)": "completions/mean_length",
        "share that ended by itself": "completions/eos_share",
        "entropy (nats per token)": "policy/entropy",
    }
    for title, name in shown.items():
        lines.append(f"| {title} | {training[0][name]:.3f} | {training[-1][name]:.3f} |")
    validated = [record for record in records if "eval_objective/scores" in record]
    if validated:
        lines += ["", f"On `{settings.validation_prompts}`: {describe(validated[-1])}."]
    lines += [
        "",
        f"{settings.max_steps:,} optimizer steps, seed {settings.seed}, {spent}. The score is what was trained",
    ]
    lines += ["for: it does not show whether the texts are good by any other measure.", ""]
    return "\n".join(lines)
