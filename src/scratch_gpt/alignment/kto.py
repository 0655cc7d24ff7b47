"""Kahneman-Tversky optimization: train a model on single completions, each labeled desirable or undesirable.

    scratch-gpt kto --model runs/sft/final --data feedback.jsonl --run-dir runs/kto

Ethayarajh et al., 2024, arXiv:2402.01306, by TRL's KTOTrainer. Preference pairs become two completions each. The rows are
shuffled once, here: KTOTrainer reads them in order, and pairs neighbors to estimate a KL divergence.
"""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from scratch_gpt.alignment.data.chat_template import encode_prompt_completion, eos_token_ids
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import unpaired_preference
from scratch_gpt.alignment.models import load_for_training, load_reference, max_length_for
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import KTOSettings
from scratch_gpt.distributed.launch import requested_model_parallel_size
from scratch_gpt.errors import UserError


def kto_command(settings: KTOSettings) -> None:
    """`scratch-gpt kto`."""
    run_recipe(settings, "kto", build, check)


def check(settings: KTOSettings) -> None:
    """Raise a UserError if a micro-batch holds one row only: each prompt is paired with a completion of another row."""
    if training_arguments(settings, "kto", Path(settings.run_dir))["per_device_train_batch_size"] < 2:
        raise UserError(
            "--kto.device_batch_size is 1: KTO pairs each prompt with the completion of a neighbor in its micro-batch, so "
            "give 2 or more"
        )


def build(settings: KTOSettings, run_dir: Path) -> Recipe:
    """Load the models and the data, and build the trainer."""
    model, tokenizer = load_for_training(settings)
    max_length = max_length_for(model, settings.kto.max_length)
    data = prepare_dataset(settings, unpaired_preference, lambda row: encode(tokenizer, row), max_length)
    for name, rows in (("training", data.train), ("held out", data.validation)):
        random.Random(settings.seed).shuffle(rows)
        desirable = sum(row["label"] for row in rows)
        undesirable = len(rows) - desirable
        data.facts[f"{name}, desirable and undesirable"] = f"{desirable:,} and {undesirable:,}"
        if not desirable or not undesirable:
            raise UserError(
                f"{settings.data}, {name}: {desirable:,} desirable and {undesirable:,} undesirable completions; KTO needs both"
            )
    model.generation_config.eos_token_id = eos_token_ids(tokenizer, data.is_chat)
    trainer = ResumableKTOTrainer(
        model,
        load_reference(settings),
        KTOConfig(
            **training_arguments(settings, "kto", run_dir),
            max_length=None,
            beta=settings.kto.beta,
            desirable_weight=settings.kto.desirable_weight,
            undesirable_weight=settings.kto.undesirable_weight,
        ),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    describe_model(settings, trainer.model)
    return Recipe(trainer, describe, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return `prompt_ids`, `completion_ids` and `label`, and the length of prompt and completion."""
    prompt, completion = encode_prompt_completion(tokenizer, row["prompt"], row["completion"])
    encoded = {"prompt_ids": prompt, "completion_ids": completion, "label": row["label"]}
    return encoded, len(prompt) + len(completion)


def describe(logs: dict[str, Any]) -> str:
    """Format the loss and the implicit rewards, beta log(policy / reference), of desirable and undesirable completions."""
    prefix = "eval_" if "eval_loss" in logs else ""
    rewards = [(side, logs.get(f"{prefix}rewards/{side}")) for side in ("chosen", "rejected")]
    shown = [f"{'validation ' if prefix else ''}loss {logs[f'{prefix}loss']:.3f}"]
    return ", ".join(shown + [f"{side} {value:.2f}" for side, value in rewards if value is not None])


class ResumableKTOTrainer(ResumableTrainerMixin, KTOTrainer):
    """KTOTrainer with exact resume, for a dataset that :func:`encode` has encoded."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        """Add the completions for the KL estimate: within a batch, each prompt gets its neighbor's.

        As KTOTrainer does it, except that a batch spans all data-parallel ranks, over which the estimate is averaged.
        """
        if not self.calculate_KL:
            return dataset
        batch_size = args.per_device_train_batch_size * (args.world_size // requested_model_parallel_size())
        completions = dataset["completion_ids"]
        batches = [completions[start : start + batch_size] for start in range(0, len(dataset), batch_size)]
        return dataset.add_column("KL_completion_ids", [ids for batch in batches for ids in [batch[-1], *batch[:-1]]])
