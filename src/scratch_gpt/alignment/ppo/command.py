"""PPO from the command line: train a model to write completions that a reward scores highly.

    scratch-gpt ppo --model runs/sft/final --reward-model runs/reward/final --data prompts.jsonl --run-dir runs/ppo
    accelerate launch --num_processes 8 -m scratch_gpt ppo --config ppo.yaml

The algorithm is in ``trainer.py``.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from scratch_gpt.alignment.data.chat_template import encode_prompt
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import prompt_only
from scratch_gpt.alignment.models import context_length
from scratch_gpt.alignment.ppo.config import PPOConfig
from scratch_gpt.alignment.ppo.trainer import PPOTrainer
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe
from scratch_gpt.alignment.rewards import import_reward_function, reward_name, reward_problems
from scratch_gpt.config import PPOSettings
from scratch_gpt.console import print0
from scratch_gpt.distributed.launch import data_parallel_size, launch_state
from scratch_gpt.errors import UserError
from scratch_gpt.model.loading import load_model
from scratch_gpt.training.metrics import read_metrics

TRAINER_SETTINGS = (
    "learning_rate",
    "value_learning_rate",
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
)
"""Settings that PPOConfig has under the same name."""


def ppo_command(settings: PPOSettings) -> None:
    """`scratch-gpt ppo`."""
    run_recipe(settings, "ppo", build, check)


def check(settings: PPOSettings) -> None:
    """Raise one UserError with all mistakes that can be found before models are loaded."""
    problems = reward_problems(settings)
    ppo = settings.ppo
    steps_per_rollout = ppo.num_ppo_epochs * ppo.num_mini_batches
    if settings.max_steps % steps_per_rollout:
        nearest = max(1, round(settings.max_steps / steps_per_rollout)) * steps_per_rollout
        problems.append(
            f"--max-steps is {settings.max_steps}; a rollout takes {steps_per_rollout} steps (ppo.num_ppo_epochs x "
            f"ppo.num_mini_batches), so give a multiple of that, such as {nearest}"
        )
    dp_size = data_parallel_size()
    quotient, remainder = divmod(ppo.mini_batch_size, dp_size * (ppo.device_batch_size or 1))
    if remainder or not quotient:
        problems.append(
            f"--ppo.mini_batch_size is {ppo.mini_batch_size}; it must be a multiple of {ppo.device_batch_size or 1} "
            f"(device_batch_size) x {dp_size} (data-parallel ranks)"
        )
    if settings.load_in_4bit:
        problems.append("--load-in-4bit: PPO trains models in full precision; use --lora-rank alone")
    if problems:
        raise UserError("\n".join(problems))


def build(settings: PPOSettings, run_dir: Path) -> Recipe:
    """Load the models and the data, and build the trainer."""
    model, tokenizer = load_model(settings.model)
    ppo = settings.ppo
    longest = context_length(model) - ppo.max_completion_length
    if longest < 1:
        raise UserError(
            f"--ppo.max_completion_length is {ppo.max_completion_length}, the model's whole context {context_length(model)} tokens: "
            "lower it"
        )
    longest = min(ppo.max_prompt_length or longest, longest)
    data = prepare_dataset(
        settings, prompt_only, lambda row: (row, len(encode_prompt(tokenizer, row["prompt"]))), longest
    )
    data.facts["reward"] = f"`{reward_name(settings)}`"
    per_rank = ppo.mini_batch_size // data_parallel_size()
    device_batch_size = ppo.device_batch_size or per_rank
    trainer = PPOTrainer(
        model,
        settings.reward_model or import_reward_function(reward_name(settings)),
        PPOConfig(
            output_dir=str(run_dir),
            per_device_train_batch_size=device_batch_size,
            gradient_accumulation_steps=per_rank // device_batch_size,
            num_mini_batches=ppo.num_mini_batches,
            num_ppo_epochs=ppo.num_ppo_epochs,
            max_steps=settings.max_steps,
            eval_strategy="steps",
            eval_steps=ppo.eval_every,
            save_steps=ppo.save_every,
            save_total_limit=ppo.keep_last,
            bf16=ppo.precision == "bf16",
            seed=settings.seed,
            report_to=settings.trackers,
            disable_tqdm=True,
            use_cpu=launch_state().device.type == "cpu",
            **{name: getattr(ppo, name) for name in TRAINER_SETTINGS},
        ),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    trainer.model.policy.generation_config.eos_token_id = trainer.stop_ids
    describe_model(settings, trainer.model.policy)
    print0(f"reward     {reward_name(settings)}")
    num_rollouts = settings.max_steps // trainer.args.steps_per_rollout
    rollout_size = ppo.mini_batch_size * ppo.num_mini_batches
    print0(f"rollouts   {num_rollouts:,} of {rollout_size:,} completions")
    return Recipe(
        trainer,
        describe,
        steps_per_rollout=trainer.args.steps_per_rollout,
        report=lambda: ({}, to_markdown(read_metrics(run_dir / "metrics.jsonl"))),
        facts=data.facts,
    )


def describe(logs: dict[str, Any]) -> str:
    """Format the score next to the signs of reward hacking: KL divergence, length, completions that do not end."""
    kind = "eval_" if "eval_objective/scores" in logs else ""
    return (
        f"{'validation ' if kind else ''}score {logs[f'{kind}objective/scores']:.3f}  "
        f"KL {logs[f'{kind}objective/kl']:.2f} nats  "
        f"length {logs[f'{kind}completions/mean_length']:.1f}  ended {logs[f'{kind}completions/eos_share']:.0%}"
    )


def to_markdown(records: list[dict[str, Any]]) -> str:
    """Compare the first and the last training entry of the metrics, for the card."""
    training = [record for record in records if "loss" in record]
    lines = ["| | first rollouts | last rollouts |", "|---|---|---|"]
    rows = {
        "score": "objective/scores",
        "KL divergence from the reference (nats per completion)": "objective/kl",
        "length (tokens)": "completions/mean_length",
        "share that ended with a stop token": "completions/eos_share",
        "entropy (nats per token)": "policy/entropy",
    }
    for title, name in rows.items():
        lines.append(f"| {title} | {training[0][name]:.3f} | {training[-1][name]:.3f} |")
    return "\n".join(
        [
            *lines,
            "",
            "The model was trained for this score, so the score alone does not show that its texts are better.",
        ]
    )
