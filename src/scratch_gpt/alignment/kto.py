"""Kahneman-Tversky optimisation: single answers, each good or bad, to a model that gives more of the good ones.

    scratch-gpt kto --model runs/sft/final --data feedback.jsonl --run-dir runs/kto

Ethayarajh et al., 2024, arXiv:2402.01306, by TRL's KTOTrainer. Pairs are taken apart. The rows are shuffled here, once, for
KTOTrainer reads them in their order, in which it pairs neighbours to estimate a KL divergence.
"""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from scratch_gpt.alignment.data.chat_template import encode_answer, stop_tokens
from scratch_gpt.alignment.data.dataset import prepare_dataset, unpaired_preference
from scratch_gpt.alignment.models import context_of, load_for_training
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import KTOSettings
from scratch_gpt.distributed.launch import requested_model_parallel_size
from scratch_gpt.errors import UserError
from scratch_gpt.model.loading import load_model


class ResumableKTOTrainer(ResumableTrainerMixin, KTOTrainer):
    """KTOTrainer on rows that are tokens already, in which no text of a user has become a special one."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        if not self.calculate_KL:
            return dataset
        # As KTOTrainer does it: each prompt of a batch with its neighbour's answer. The batch is that of all processes, over
        # which the divergence is averaged, too.
        size = args.per_device_train_batch_size * (args.world_size // requested_model_parallel_size())
        answers = dataset["completion_ids"]
        batches = [answers[start : start + size] for start in range(0, len(dataset), size)]
        return dataset.add_column("KL_completion_ids", [ids for some in batches for ids in [some[-1], *some[:-1]]])


def kto_command(settings: KTOSettings) -> None:
    """`scratch-gpt kto`."""
    run_recipe(settings, "kto", build)


def build(settings: KTOSettings, run_dir: Path) -> Recipe:
    """Models, data and trainer put together."""
    arguments = training_arguments(settings, "kto", run_dir)
    if arguments["per_device_train_batch_size"] < 2:
        raise UserError(
            "--kto.device_batch_size is 1: each prompt is compared with a neighbour's answer, so give 2 or more"
        )
    model, tokenizer = load_for_training(settings)
    reference = load_model(settings.model)[0].eval().requires_grad_(False) if settings.lora_rank is None else None
    longest = min(settings.kto.max_length or context_of(model), context_of(model))
    data = prepare_dataset(settings, unpaired_preference, lambda row: encode(tokenizer, row), longest)
    for name, rows in (("training", data.train), ("held out", data.validation)):
        random.Random(settings.seed).shuffle(rows)
        good = sum(row["label"] for row in rows)
        data.facts[f"{name}, good and bad"] = f"{good:,} and {len(rows) - good:,}"
        if not 0 < good < len(rows):
            raise UserError(
                f"{settings.data}, {name}: {good:,} good and {len(rows) - good:,} bad answers; it takes both"
            )
    model.generation_config.eos_token_id = stop_tokens(tokenizer, data.chat)
    trainer = ResumableKTOTrainer(
        model,
        reference,
        KTOConfig(
            **arguments,
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
    """Ids of prompt and answer, and whether it is good; and how many they are."""
    prompt, completion = encode_answer(tokenizer, row["prompt"], row["completion"])
    return {"prompt_ids": prompt, "completion_ids": completion, "label": row["label"]}, len(prompt) + len(completion)


def describe(logs: dict[str, Any]) -> str:
    """Rewards are implicit: beta log(policy / reference) of good and of bad answers."""
    kind = "eval_" if "eval_loss" in logs else ""
    said = f"{'validation ' if kind else ''}loss {logs[f'{kind}loss']:.3f}"
    found = [(side, logs.get(f"{kind}rewards/{side}")) for side in ("chosen", "rejected")]
    return said + "".join(f", {side} {value:.2f}" for side, value in found if value is not None)
