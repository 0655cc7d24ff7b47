"""Supervised fine-tuning: conversations to a model that answers.

    scratch-gpt sft --model runs/quickstart/final --data conversations.jsonl --run-dir runs/sft
    accelerate launch --config_file configs/accelerate/ddp.yaml -m scratch_gpt sft --config sft.yaml

The loss falls on what the assistant says and on the token that ends its turn, and on nothing else; TRL's SFTTrainer does the
rest.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from scratch_gpt.alignment.chat import encode_answer, encode_chat, require_generation_marks, stop_tokens
from scratch_gpt.alignment.models import context_of, load_for_training
from scratch_gpt.alignment.records import conversations, learning_data
from scratch_gpt.alignment.stage import Stage, describe_model, lora, run_stage, training_arguments
from scratch_gpt.config import SFTSettings

NO_LOSS = -100


def sft_command(settings: SFTSettings) -> None:
    """`scratch-gpt sft`."""
    run_stage(settings, "sft", build)


def build(settings: SFTSettings, run_dir: Path) -> Stage:
    """Model, data and trainer put together."""
    model, tokenizer = load_for_training(settings)
    longest = min(settings.sft.max_length or context_of(model), context_of(model))
    data = learning_data(settings, conversations, lambda row: encode(tokenizer, row), longest)
    model.generation_config.eos_token_id = stop_tokens(tokenizer, data.chat)  # it is to stop where it learns to
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **training_arguments(settings, "sft", run_dir),
            max_length=longest if settings.sft.packing else None,
            packing=settings.sft.packing,
            eval_packing=False,
        ),
        train_dataset=Dataset.from_list(data.train),
        eval_dataset=Dataset.from_list(data.validation),
        processing_class=tokenizer,
        peft_config=lora(settings, "CAUSAL_LM"),
    )
    describe_model(settings, trainer.model)
    return Stage(trainer, tokenizer, describe, facts=data.facts)


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
