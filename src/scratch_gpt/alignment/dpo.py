"""Direct preference optimization: train a model on preference pairs, without a reward model.

    scratch-gpt dpo --model runs/sft/final --data pairs.jsonl --run-dir runs/dpo

Rafailov et al., 2023, arXiv:2305.18290, by TRL's DPOTrainer. The reference model is the initial model, loaded a second time
from disk; with LoRA, it is the same model with its adapters disabled.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from scratch_gpt.alignment.data.chat_template import encode_prompt_completion, eos_token_ids
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import preference
from scratch_gpt.alignment.models import load_for_training, load_reference, max_length_for
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import DPOSettings


def dpo_command(settings: DPOSettings) -> None:
    """`scratch-gpt dpo`."""
    run_recipe(settings, "dpo", build)


def build(settings: DPOSettings, run_dir: Path) -> Recipe:
    """Load the models and the data, and build the trainer."""
    model, tokenizer = load_for_training(settings)
    max_length = max_length_for(model, settings.dpo.max_length)
    data = prepare_dataset(settings, preference, lambda row: encode(tokenizer, row), max_length)
    model.generation_config.eos_token_id = eos_token_ids(tokenizer, data.is_chat)
    trainer = ResumableDPOTrainer(
        model,
        load_reference(settings),
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
    """Return `prompt_ids`, `chosen_ids` and `rejected_ids`, and the length of the prompt with the longer completion."""
    prompt, chosen = encode_prompt_completion(tokenizer, row["prompt"], row["chosen"])
    _, rejected = encode_prompt_completion(tokenizer, row["prompt"], row["rejected"])
    encoded = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return encoded, len(prompt) + max(len(chosen), len(rejected))


def describe(logs: dict[str, Any]) -> str:
    """Format loss, accuracy, and margin: the mean difference of the implicit rewards beta log(policy / reference)."""
    prefix = "eval_" if "eval_loss" in logs else ""
    return (
        f"{'validation ' if prefix else ''}loss {logs[f'{prefix}loss']:.3f}, accuracy "
        f"{logs[f'{prefix}rewards/accuracies']:.1%}, margin {logs[f'{prefix}rewards/margins']:.2f}"
    )


class ResumableDPOTrainer(ResumableTrainerMixin, DPOTrainer):
    """DPOTrainer with exact resume, for a dataset that :func:`encode` has encoded."""

    uses_resumable_sampler = True

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **keywords: Any) -> Any:
        return dataset  # TRL would encode text again, and turn special tokens that a user typed into real ones
