"""Supervised fine-tuning: train a base model on conversations, so that it answers.

    scratch-gpt sft --model runs/quickstart/final --data conversations.jsonl --run-dir runs/sft
    accelerate launch --config_file configs/accelerate/ddp.yaml -m scratch_gpt sft --config sft.yaml

The loss covers the assistant's tokens and the token that ends each of its turns; everything else is context. The training
itself is done by TRL's SFTTrainer.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from scratch_gpt.alignment.data.chat_template import (
    encode_chat,
    encode_prompt_completion,
    eos_token_ids,
    require_generation_markers,
)
from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import prompt_completion
from scratch_gpt.alignment.models import load_for_training, max_length_for, unwrap_peft
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import SFTSettings
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTForCausalLM

IGNORE_INDEX = -100
"""Label of a token that the loss skips."""


def sft_command(settings: SFTSettings) -> None:
    """`scratch-gpt sft`."""
    run_recipe(settings, "sft", build)


def build(settings: SFTSettings, run_dir: Path) -> Recipe:
    """Load the model and the data, and build the trainer."""
    model, tokenizer = load_for_training(settings)
    max_length = max_length_for(model, settings.sft.max_length)
    data = prepare_dataset(settings, prompt_completion, lambda row: encode(tokenizer, row), max_length)
    model.generation_config.eos_token_id = eos_token_ids(tokenizer, data.is_chat)
    train_dataset, collator = Dataset.from_list(data.train), None
    if settings.sft.packing:
        # SFTConfig's own packing concatenates all sequences of a batch into one: without a kernel for sequences of unequal
        # length, the cost of attention then grows with the square of the batch size.
        train_dataset = pack_dataset(train_dataset, max_length, "bfd")
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, return_position_ids=True)
    trainer = ResumableSFTTrainer(
        model,
        SFTConfig(**training_arguments(settings, "sft", run_dir), max_length=None),
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    describe_model(settings, trainer.model)
    return Recipe(trainer, describe, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return `input_ids` and `labels` of a row, and its length in tokens.

    In `messages`, all turns of the assistant are labels; in `prompt` and `completion`, only the completion.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not mark the assistant's tokens.
    """
    if "messages" in row:
        require_generation_markers(tokenizer)
        ids, assistant_mask = encode_chat(tokenizer, row["messages"])
    else:
        prompt, completion = encode_prompt_completion(tokenizer, row["prompt"], row["completion"])
        ids, assistant_mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    labels = [token if learned else IGNORE_INDEX for token, learned in zip(ids, assistant_mask, strict=True)]
    return {"input_ids": ids, "labels": labels}, len(ids)


def describe(logs: dict[str, Any]) -> str:
    """Format the loss in nats per token of the assistant."""
    if "eval_loss" in logs:
        return f"validation loss {logs['eval_loss']:.3f}, accuracy {logs['eval_mean_token_accuracy']:.1%}"
    return f"loss {logs['loss']:.3f}"


class ResumableSFTTrainer(ResumableTrainerMixin, SFTTrainer):
    """SFTTrainer with exact resume, and with a validation loss over tokens.

    The validation loss is the mean over all held-out tokens of the assistant. Trainer's own is the mean over batches, however
    many tokens are in each.
    """

    uses_resumable_sampler = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        if "position_ids" in inputs:  # packed: without a mask, the model separates sequences where positions restart
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if isinstance(unwrap_peft(self.output_model), ScratchGPTForCausalLM):
            # The same loss as TRL's head in a sixth of its time on CPU, because TRL computes entropies as well.
            return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *arguments, **keywords)
        return super().compute_loss(model, inputs, *arguments, **keywords)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size, dp_size = self.args.per_device_eval_batch_size, self.dp_size
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for start in range(0, len(dataset), batch_size * dp_size):
            own = range(start + batch_size * self.dp_rank, len(dataset))[:batch_size]
            # All ranks of a sharded model run each forward pass; one that has no rows left repeats the first, uncounted.
            rows = dataset.select(own or range(min(batch_size, len(dataset)))).to_list()
            inputs = self._prepare_inputs(self.data_collator(rows))
            outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            batch_sums = [-outputs.log_probs.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()]
            sums += torch.stack([value.double() for value in batch_sums]) * bool(own)
        nats, correct, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nats / tokens,
            f"{metric_key_prefix}_mean_token_accuracy": correct / tokens,
        }
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
