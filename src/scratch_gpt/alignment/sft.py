"""Supervised fine-tuning: conversations to a model that answers.

    scratch-gpt sft --model runs/quickstart/final --data conversations.jsonl --run-dir runs/sft
    accelerate launch --config_file configs/accelerate/ddp.yaml -m scratch_gpt sft --config sft.yaml

The loss falls on what the assistant says and on the token that ends its turn, and on nothing else; TRL's SFTTrainer does the
rest.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from scratch_gpt.alignment.data.chat_template import encode_answer, encode_chat, require_generation_marks, stop_tokens
from scratch_gpt.alignment.data.dataset import conversations, prepare_dataset
from scratch_gpt.alignment.models import context_of, load_for_training, unwrap_peft
from scratch_gpt.alignment.recipe import Recipe, describe_model, peft_config, run_recipe, training_arguments
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.config import SFTSettings
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTForCausalLM

NO_LOSS = -100


class ResumableSFTTrainer(ResumableTrainerMixin, SFTTrainer):
    """SFTTrainer in runs that go on. Its validation loss is the mean over all held-out tokens of the assistant: Trainer's own
    is one over batches, whatever number of tokens is in them."""

    uses_resumable_sampler = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        if "position_ids" in inputs:  # packed: the model parts a row where they begin anew, if no mask says otherwise
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if isinstance(unwrap_peft(self.output_model), ScratchGPTForCausalLM):
            # The model's own loss is that of TRL's head, in a sixth of its time on CPU: that one makes entropies as well.
            return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *arguments, **keywords)
        return super().compute_loss(model, inputs, *arguments, **keywords)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        size, world = self.args.per_device_eval_batch_size, self.dp_size
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for start in range(0, len(data), size * world):
            mine = range(start + size * self.dp_rank, len(data))[:size]
            # Where models are sharded all processes take part in each batch; one that has no rows left repeats some.
            rows = data.select(mine or range(min(size, len(data)))).to_list()
            inputs = self._prepare_inputs(self.data_collator(rows))
            outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            counted = [-outputs.log_probs.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()]
            sums += torch.stack([value.double() for value in counted]) * bool(mine)
        nats, right, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nats / tokens,
            f"{metric_key_prefix}_mean_token_accuracy": right / tokens,
        }
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def sft_command(settings: SFTSettings) -> None:
    """`scratch-gpt sft`."""
    run_recipe(settings, "sft", build)


def build(settings: SFTSettings, run_dir: Path) -> Recipe:
    """Model, data and trainer put together."""
    model, tokenizer = load_for_training(settings)
    longest = min(settings.sft.max_length or context_of(model), context_of(model))
    data = prepare_dataset(settings, conversations, lambda row: encode(tokenizer, row), longest)
    model.generation_config.eos_token_id = stop_tokens(tokenizer, data.chat)  # it is to stop where it learns to
    rows, collator = Dataset.from_list(data.train), None
    if settings.sft.packing:
        # Not by SFTConfig, which lays all rows of a batch end to end: attention over that is quadratic in the batch as well
        # wherever there is no kernel for rows of several lengths.
        rows = pack_dataset(rows, longest, "bfd")
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, return_position_ids=True)
    trainer = ResumableSFTTrainer(
        model,
        SFTConfig(**training_arguments(settings, "sft", run_dir), max_length=None),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=peft_config(settings, "CAUSAL_LM"),
    )
    describe_model(settings, trainer.model)
    return Recipe(trainer, describe, facts=data.facts)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Ids, and as labels those that the model is to write; and their number.

    Of `messages`, all that the assistant says; of `prompt` and `completion`, only the latter.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not say what the assistant writes.
    """
    if "messages" in row:
        require_generation_marks(tokenizer)
        ids, mask = encode_chat(tokenizer, row["messages"])
    else:
        prompt, completion = encode_answer(tokenizer, row["prompt"], row["completion"])
        ids, mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    labels = [token if one else NO_LOSS for token, one in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}, len(ids)


def describe(logs: dict[str, Any]) -> str:
    """Loss in nats per token of the assistant."""
    if "eval_loss" in logs:
        return f"validation loss {logs['eval_loss']:.3f}, accuracy {logs['eval_mean_token_accuracy']:.1%}"
    return f"loss {logs['loss']:.3f}"
