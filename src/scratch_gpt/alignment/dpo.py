"""Direct preference optimisation: pairs of answers to a model that prefers the better ones.

    scratch-gpt dpo --model runs/sft/final --data pairs.jsonl --run-dir runs/dpo

Rafailov et al., 2023, arXiv:2305.18290, by TRL's DPOTrainer. The model it is measured against is the one it begins with, loaded
a second time from disk; with adapters, the same model without them.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from scratch_gpt.alignment.data.chat_template import encode_answer, stop_tokens
from scratch_gpt.alignment.data.dataset import preference, prepare_dataset
from scratch_gpt.alignment.models import context_of, load_for_training
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import DPOSettings
from scratch_gpt.model.loading import load_model


class ResumableDPOTrainer(ResumableTrainerMixin, DPOTrainer):
    """DPOTrainer on rows that are tokens already, in which no text of a user has become a special one."""

    uses_resumable_sampler = True

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **keywords: Any) -> Any:
        return dataset


def dpo_command(settings: DPOSettings) -> None:
    """`scratch-gpt dpo`."""
    run_recipe(settings, "dpo", build)


def build(settings: DPOSettings, run_dir: Path) -> Recipe:
    """Models, data and trainer put together."""
    model, tokenizer = load_for_training(settings)
    reference = load_model(settings.model)[0].eval().requires_grad_(False) if settings.lora_rank is None else None
    longest = min(settings.dpo.max_length or context_of(model), context_of(model))
    data = prepare_dataset(settings, preference, lambda row: encode(tokenizer, row), longest)
    model.generation_config.eos_token_id = stop_tokens(tokenizer, data.chat)
    trainer = ResumableDPOTrainer(
        model,
        reference,
        DPOConfig(
            **training_arguments(settings, "dpo", run_dir),
            max_length=None,
            beta=settings.dpo.beta,
            loss_type=[settings.dpo.loss_type],
            label_smoothing=settings.dpo.label_smoothing,
        ),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    describe_model(settings, trainer.model)
    return Recipe(trainer, describe, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Ids of the prompt and of both sides; and the tokens of the prompt with the longer one."""
    (prompt, chosen), (_, rejected) = (encode_answer(tokenizer, row["prompt"], row[s]) for s in ("chosen", "rejected"))
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return ids, len(prompt) + max(len(chosen), len(rejected))


def describe(logs: dict[str, Any]) -> str:
    """The margin is the difference of the implicit rewards of the two sides, beta log(policy / reference)."""
    kind = "eval_" if "eval_loss" in logs else ""
    return (
        f"{'validation ' if kind else ''}loss {logs[f'{kind}loss']:.3f}, accuracy "
        f"{logs[f'{kind}rewards/accuracies']:.1%}, margin {logs[f'{kind}rewards/margins']:.2f}"
    )
