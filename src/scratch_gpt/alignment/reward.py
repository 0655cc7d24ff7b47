"""The reward model: train a model on preference pairs to score a completion.

    scratch-gpt reward --model runs/sft/final --data pairs.jsonl --run-dir runs/reward

The language model's backbone gets a head with one output, and learns to score the chosen completion of a pair higher than the
rejected one (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155, equation 1), by TRL's RewardTrainer. At the end
its quality is measured on the held-out pairs: report.json, calibration.svg and the model card.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from scratch_gpt.alignment.data.chat_template import encode_prompt_completion
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import preference
from scratch_gpt.alignment.models import load_reward_model, max_length_for
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.reward_report import PreferenceReport, calibration_plot, preference_report
from scratch_gpt.alignment.rewards import score_sequences
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import RewardSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError
from scratch_gpt.files import write_text


def reward_command(settings: RewardSettings) -> None:
    """`scratch-gpt reward`."""
    run_recipe(settings, "reward", build, check)


def check(settings: RewardSettings) -> None:
    """Raise a UserError for settings that a reward model does not support."""
    if settings.load_in_4bit:
        raise UserError("--load-in-4bit: a reward model is trained in full precision; use --lora-rank alone")


def build(settings: RewardSettings, run_dir: Path) -> Recipe:
    """Load the model and the data, and build the trainer."""
    model, tokenizer = load_reward_model(settings.model)
    max_length = max_length_for(model, settings.reward.max_length)
    data = prepare_dataset(settings, preference, lambda row: encode(tokenizer, row), max_length)
    trainer = ResumableRewardTrainer(
        model,
        RewardConfig(
            **training_arguments(settings, "reward", run_dir),
            max_length=None,
            center_rewards_coefficient=settings.reward.center_rewards_coefficient,
        ),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "SEQ_CLS"),
    )
    describe_model(settings, trainer.model)
    batch_size = settings.reward.device_batch_size or settings.reward.batch_size

    def report() -> tuple[dict[str, Any], str]:
        result = score_pairs(trainer.output_model, data.validation, batch_size)
        if trainer.accelerator.is_main_process:
            write_text(run_dir / "calibration.svg", calibration_plot(result.bins))
        print0(f"held out   accuracy {result.accuracy}, calibration error {result.calibration_error:.3f}")
        print0(f"           accuracy of choosing the longer completion: {result.by_length}")
        return result.as_dict(), to_markdown(result)

    return Recipe(trainer, describe, report=report, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return `chosen_ids` and `rejected_ids`, each with the prompt in front, and the length of the longer one."""
    prompt_completions = {
        side: encode_prompt_completion(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")
    }
    encoded = {f"{side}_ids": prompt + completion for side, (prompt, completion) in prompt_completions.items()}
    return encoded, max(map(len, encoded.values()))


def describe(logs: dict[str, Any]) -> str:
    """Format loss, accuracy, and margin: the mean difference of the scores of chosen and rejected."""
    prefix = "eval_" if "eval_loss" in logs else ""
    return (
        f"{'validation ' if prefix else ''}loss {logs[f'{prefix}loss']:.3f}, accuracy {logs[f'{prefix}accuracy']:.1%}, "
        f"margin {logs[f'{prefix}margin']:.2f}"
    )


class ResumableRewardTrainer(ResumableTrainerMixin, RewardTrainer):
    """RewardTrainer with exact resume."""

    uses_resumable_sampler = True


@torch.no_grad()
def score_pairs(model: Any, rows: list[dict[str, Any]], batch_size: int) -> PreferenceReport:
    """Score encoded pairs, ``batch_size`` at a time, and report how well the scores order them."""
    model.eval()
    margins: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sequences = [torch.tensor(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in batch]
        chosen, rejected = score_sequences(model, sequences).split(len(batch))
        margins += (chosen - rejected).tolist()
    return preference_report(margins, [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows])


def to_markdown(result: PreferenceReport) -> str:
    """Format the report for the model card."""
    lines = [
        f"On held-out pairs it scores the chosen completion higher in {result.accuracy}, 95% interval. Choosing the longer",
        f"completion is right in {result.by_length}.",
        "",
        "| confidence | accuracy | pairs |",
        "|---:|---:|---:|",
        *(f"| {b.confidence:.0%} | {b.accuracy.value:.0%} | {b.accuracy.total} |" for b in result.bins),
        "",
        f"Calibration error {result.calibration_error:.3f}, loss {result.loss:.3f} nats (0.693 if all scores are equal).",
    ]
    return "\n".join(lines)
