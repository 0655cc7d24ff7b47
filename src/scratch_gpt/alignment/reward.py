"""The reward model: pairs of answers to a score for one.

    scratch-gpt reward --model runs/sft/final --data pairs.jsonl --run-dir runs/reward

The body of the language model gets a head with one output, and learns to score the better answer of a pair higher (Bradley
and Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155, equation 1), by TRL's RewardTrainer. At the end, the held-out pairs
say how good it is: report.json, calibration.svg, and the card.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import RewardConfig, RewardTrainer

from scratch_gpt.alignment.data.chat_template import encode_answer
from scratch_gpt.alignment.data.dataset import preference, prepare_dataset
from scratch_gpt.alignment.models import context_of, load_reward_model
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.reward_report import PreferenceReport, calibration_plot, report
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import RewardSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError
from scratch_gpt.files import write_text


class ResumableRewardTrainer(ResumableTrainerMixin, RewardTrainer):
    """RewardTrainer in runs that go on."""

    uses_resumable_sampler = True


def reward_command(settings: RewardSettings) -> None:
    """`scratch-gpt reward`."""
    run_recipe(settings, "reward", build, check)


def check(settings: RewardSettings) -> None:
    if settings.load_in_4bit:
        raise UserError("--load-in-4bit: a reward model is trained in full precision; give --lora-rank alone")


def build(settings: RewardSettings, run_dir: Path) -> Recipe:
    """Model, data and trainer put together."""
    model, tokenizer = load_reward_model(settings.model)
    longest = min(settings.reward.max_length or context_of(model), context_of(model))
    data = prepare_dataset(settings, preference, lambda row: encode(tokenizer, row), longest)
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

    def tell() -> tuple[dict[str, Any], str]:
        found = score_pairs(
            trainer.output_model, data.validation, settings.reward.device_batch_size or settings.reward.batch_size
        )
        if trainer.accelerator.is_main_process:
            write_text(run_dir / "calibration.svg", calibration_plot(found.bins))
        print0(f"held out   accuracy {found.accuracy}, calibration error {found.calibration_error:.3f}")
        print0(f"           a judge that takes the longer answer: {found.by_length}")
        return found.as_dict(), to_markdown(found)

    return Recipe(trainer, describe, report=tell, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Of each side, prompt and answer as one; and the tokens of the longer one."""
    sides = {side: encode_answer(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
    whole = {f"{side}_ids": prompt + answer for side, (prompt, answer) in sides.items()}
    return whole, max(map(len, whole.values()))


@torch.no_grad()
def score_pairs(model: Any, rows: list[dict[str, Any]], batch_size: int) -> PreferenceReport:
    """What the model makes of encoded pairs."""
    model.eval()
    margins: list[float] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        chosen, rejected = ([row[f"{side}_ids"] for row in some] for side in ("chosen", "rejected"))
        scores = _scores(model, chosen + rejected)
        margins += (scores[: len(some)] - scores[len(some) :]).tolist()
    return report(margins, [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows])


def _scores(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    input_ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    input_ids = input_ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    return model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0].float().cpu()


def describe(logs: dict[str, Any]) -> str:
    kind = "eval_" if "eval_loss" in logs else ""
    said = f"{'validation ' if kind else ''}loss {logs[f'{kind}loss']:.3f}"
    return f"{said}, accuracy {logs[f'{kind}accuracy']:.1%}, margin {logs[f'{kind}margin']:.2f}"


def to_markdown(found: PreferenceReport) -> str:
    """For the card."""
    lines = [
        f"On held-out pairs it scores the better answer higher in {found.accuracy}, 95% interval. A judge that takes the",
        f"longer answer is right in {found.by_length}.",
        "",
        "| how sure it is | how often it is right | pairs |",
        "|---:|---:|---:|",
        *(f"| {b.confidence:.0%} | {b.accuracy.value:.0%} | {b.accuracy.number} |" for b in found.bins),
        "",
        f"Calibration error {found.calibration_error:.3f}, loss {found.loss:.3f} nats (0.693 for one that knows nothing).",
    ]
    return "\n".join(lines)
