"""The prompts of PPO: the data as the user gives it, encoded, and the tokens that end a completion."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from scratch_gpt.alignment.data.chat_template import encode_prompt, end_of_turn
from scratch_gpt.alignment.ppo.config import PPOConfig

logger = logging.get_logger(__name__)


def as_dataset(data: Any) -> Dataset | None:
    """Return ``data``, a dataset or a list of dictionaries, as a dataset.

    Raises:
        ValueError: it is something else, or has no column `prompt`.
    """
    if data is None or isinstance(data, Dataset):
        dataset = data
    elif isinstance(data, Sequence):
        dataset = Dataset.from_list(list(data))
    else:
        raise ValueError(f"PPOTrainer takes a datasets.Dataset or a list of dictionaries, not a {type(data).__name__}")
    if dataset is not None and "prompt" not in dataset.column_names:
        raise ValueError(f"the data has no column prompt, but {', '.join(dataset.column_names) or 'none at all'}")
    return dataset


def encode_prompts(
    data: Dataset | None, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel
) -> Dataset | None:
    """Add a column `prompt_ids`, and drop the prompts that are too long.

    Raises:
        ValueError: a prompt is empty, or all are too long, or completions fill the model's whole context.
    """
    if data is None:
        return None
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    longest = args.max_prompt_length
    if context is not None:
        longest = min(longest or context, context - args.max_completion_length)
        if longest < 1:
            raise ValueError(
                f"max_completion_length is {args.max_completion_length}, the model's whole context {context} tokens"
            )
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in data["prompt"]]
    empty = [row for row, ids in enumerate(prompt_ids) if not ids]
    if empty:
        raise ValueError(f"the prompt of row {empty[0]} is empty ({len(empty)} of {len(data)} are)")
    kept = [row for row, ids in enumerate(prompt_ids) if longest is None or len(ids) <= longest]
    if not kept:
        raise ValueError(f"all {len(data)} prompts are longer than {longest} tokens: raise max_prompt_length")
    if len(kept) < len(data):
        logger.warning(f"skipping {len(data) - len(kept)} of {len(data)} prompts: longer than {longest} tokens")
    return data.select(kept).add_column("prompt_ids", [prompt_ids[row] for row in kept])


def stop_token_ids(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, datasets: list[Dataset | None]
) -> list[int]:
    """Return the ids of ``args.stop_tokens``.

    Default: the tokenizer's and the policy's end of sequence and, for conversations, the chat template's end of turn.

    Raises:
        ValueError: a token is unknown, or the prompts are conversations and there is no chat template.
    """
    if args.stop_tokens is not None:
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in args.stop_tokens if token not in vocabulary]
        if unknown:
            raise ValueError(f"stop_tokens: the tokenizer has no token {', '.join(map(repr, unknown))}")
        return [vocabulary[token] for token in args.stop_tokens]
    of_policy = getattr(policy.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(of_policy if isinstance(of_policy, list) else [of_policy])]
    if any(data is not None and len(data) and not isinstance(data[0]["prompt"], str) for data in datasets):
        if tokenizer.chat_template is None:
            raise ValueError("the prompts are conversations, but the tokenizer has no chat template")
        ids.append(end_of_turn(tokenizer))
    return sorted({int(token_id) for token_id in ids if token_id is not None})
