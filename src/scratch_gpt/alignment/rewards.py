"""Rewards of completions: a sequence classifier with one label (such as a reward model of this package), or a Python function."""

import importlib
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scratch_gpt.alignment.data import demo
from scratch_gpt.config import OnlineSettings
from scratch_gpt.errors import UserError

RewardFunction = Callable[..., Sequence[float]]
"""A function of the user: `f(prompts, completions, completion_ids, **columns) -> scores`, as TRL's GRPOTrainer takes it."""
Reward: TypeAlias = str | PreTrainedModel | RewardFunction
"""A reward as the user gives it: the path of a classifier, a classifier, or a function."""


class RewardError(ValueError):
    """Raised if a reward fails, or does not return one finite number per completion."""


@dataclass
class Completions:
    """Prompts and their completions; every list has one entry per completion."""

    prompts: list[Any]
    """Text, or messages."""
    completions: list[Any]
    """Text without special tokens; or, where prompts are messages, a list of the assistant's message."""
    completion_ids: list[list[int]]
    """Token ids, including the stop token if there is one."""
    sequences: list[torch.Tensor]
    """Ids of prompt and completion, (seq,) each, without padding."""
    columns: dict[str, list[Any]]
    """The other columns of the dataset."""


class RewardModel:
    """A frozen sequence classifier with one label, in evaluation mode.

    If its tokenizer differs from the policy's, the text is encoded again, with the tokenizer's end of sequence after a
    completion that ended by itself.

    Raises:
        ValueError: the classifier has several labels, or needs a tokenizer of its own that was not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        policy_tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
    ):
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, {type(model).__name__} has {model.config.num_labels}")
        self.name = type(model).__name__
        self.model = model.eval().requires_grad_(False)
        self.policy_tokenizer, self.stop_ids = policy_tokenizer, set(stop_ids)
        same_tokenizer = tokenizer is None or tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.tokenizer = None if same_tokenizer else tokenizer
        if same_tokenizer and model.config.vocab_size < len(policy_tokenizer):
            raise ValueError(
                f"the reward model knows {model.config.vocab_size} tokens, the policy's tokenizer has "
                f"{len(policy_tokenizer)}: give the reward model's own tokenizer in reward_processing_classes"
            )

    @torch.no_grad()
    def __call__(self, batch: Completions) -> list[float]:
        sequences = batch.sequences
        if self.tokenizer is not None:
            sequences = [self._encode_again(batch, index) for index in range(len(sequences))]
        self._check_length(max(map(len, sequences)))
        return score_sequences(self.model, sequences).tolist()

    def _encode_again(self, batch: Completions, index: int) -> torch.Tensor:
        """Encode prompt and completion ``index`` with the classifier's own tokenizer and chat template."""
        assert self.tokenizer is not None
        ids = batch.sequences[index].tolist()
        if isinstance(batch.prompts[index], list) and self.tokenizer.chat_template is not None:
            messages = batch.prompts[index] + batch.completions[index]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        text = self.policy_tokenizer.decode(ids, skip_special_tokens=True)
        own_ids = self.tokenizer(text).input_ids
        eos, ended = self.tokenizer.eos_token_id, ids[-1] in self.stop_ids
        if ended and eos is not None and (not own_ids or own_ids[-1] != eos):
            own_ids = [*own_ids, eos]
        return torch.tensor(own_ids)

    def _check_length(self, length: int) -> None:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(
                f"a prompt with its completion is {length} tokens long for the reward model, whose context is {context}: lower "
                "max_prompt_length or max_completion_length"
            )


def score_sequences(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Return the classifier's scores, (batch,) in float32 on the CPU, of sequences of ids of unequal length."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (batch, seq)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    # Some classifiers find the last token by the padding token, not by the mask.
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, pad_token_id)
    outputs = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
    return outputs.logits[:, 0].float().cpu()


class FunctionReward:
    """A :data:`RewardFunction` of the user; exceptions are raised again with the place where they occurred."""

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)

    def __call__(self, batch: Completions) -> list[float]:
        try:
            scores = self.function(
                prompts=batch.prompts,
                completions=batch.completions,
                completion_ids=batch.completion_ids,
                **batch.columns,
            )
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"the reward function {self.name} raised {type(error).__name__}: {error} ({where.filename}, line "
                f"{where.lineno}). The first of its {len(batch.completions)} completions was {batch.completions[0]!r}"
            ) from error
        return scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)


def load_rewards(
    rewards: Reward | list[Reward],
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> list[RewardModel | FunctionReward]:
    """Make rewards callable; a path is loaded, with its tokenizer.

    Args:
        rewards: One or several.
        tokenizers: Of the classifiers among them. Default: that of the path, else the policy's.
        policy_tokenizer: The tokenizer of the policy, whose completions are scored.
        stop_ids: The ids that end a completion.

    Raises:
        TypeError, ValueError: a reward is of another type, or a classifier cannot be used.
    """
    rewards = rewards if isinstance(rewards, list) else [rewards]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(rewards)
    if not rewards:
        raise ValueError("reward_funcs is empty: give a reward model or a function")
    if len(tokenizers) != len(rewards):
        raise ValueError(f"there are {len(rewards)} rewards, but {len(tokenizers)} reward_processing_classes")
    loaded: list[RewardModel | FunctionReward] = []
    for reward, tokenizer in zip(rewards, tokenizers, strict=True):
        if isinstance(reward, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(reward)
            reward = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32)
        if isinstance(reward, PreTrainedModel):
            loaded.append(RewardModel(reward, tokenizer, policy_tokenizer, stop_ids))
        elif callable(reward):
            loaded.append(FunctionReward(reward))
        else:
            raise TypeError(f"{reward!r} is neither a path, a model nor a function")
    return loaded


def import_reward_function(name: str) -> RewardFunction:
    """Import the function `module:function`; the module may be a file in the current folder.

    Raises:
        UserError: it does not exist.
    """
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name) if module_name and function_name else None
    except ImportError as error:
        raise UserError(f"--reward {name}: cannot import {module_name} here ({error})") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"--reward {name}: give MODULE:FUNCTION, such as rewards:politeness for a function in ./rewards.py"
        )
    return function


def reward_name(settings: OnlineSettings) -> str:
    """Return the folder of the reward model, or the reward function's `module:function`; "" if neither is given.

    Default: for the demonstration data, its own reward function.
    """
    if settings.reward_model is None and settings.reward is None and settings.data == demo.NAME:
        return f"{demo.__name__}:{demo.complete_sentence.__name__}"
    return settings.reward_model or settings.reward or ""


def reward_problems(settings: OnlineSettings) -> list[str]:
    """Return the mistakes in the choice of the reward that can be found before it is loaded."""
    if not reward_name(settings) or (settings.reward_model is not None and settings.reward is not None):
        return ["give either --reward-model FOLDER or --reward MODULE:FUNCTION"]
    if settings.reward_model is not None and not (Path(settings.reward_model) / "config.json").is_file():
        return [f"--reward-model: {settings.reward_model} holds no model (no config.json)"]
    return []


def score(reward: RewardModel | FunctionReward, batch: Completions) -> torch.Tensor:
    """Return one finite score per completion, (batch,).

    Raises:
        RewardError: the reward failed, or returned another number of scores, or one that is not a finite number.
    """
    scores = reward(batch)
    expected = len(batch.completions)
    if len(scores) != expected:
        raise RewardError(f"the reward {reward.name} returned {len(scores)} scores for {expected} completions")
    for index, value in enumerate(scores):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(
                f"the reward {reward.name} returned {value!r}, not a finite number, for the completion "
                f"{batch.completions[index]!r} of the prompt {batch.prompts[index]!r}"
            )
    return torch.tensor([float(value) for value in scores])
