"""What a completion is worth: a reward model of ours, any sequence classifier with one score, or a Python function."""

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

from scratch_gpt.alignment.data import demo as bundled
from scratch_gpt.config import OnlineSettings
from scratch_gpt.errors import UserError

RewardFunction = Callable[..., Sequence[float]]
Reward: TypeAlias = str | PreTrainedModel | RewardFunction


class RewardError(ValueError):
    """A reward that raised, or gave something else than one finite number per completion."""


@dataclass
class Completions:
    """What was asked and what was answered, one entry per row."""

    prompts: list[Any]
    """Text, or messages."""
    completions: list[Any]
    """Text without special tokens or, where the prompt is messages, the assistant's message."""
    completion_ids: list[list[int]]
    """With the stop token, where there is one."""
    sequences: list[torch.Tensor]
    """Prompt and completion ids, without padding."""
    columns: dict[str, list[Any]]
    """The other columns of the data set."""


class RewardModel:
    """A sequence classifier with one label, in evaluation mode and frozen.

    Of another tokenizer than the policy's, it reads the text, encoded anew, its end-of-sequence token after a completion
    that ended by itself.

    Raises:
        ValueError: it has several labels, or its tokenizer is not known and cannot be the policy's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        policy_tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
    ):
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model gives one score, {type(model).__name__} has {model.config.num_labels} labels"
            )
        self.name = type(model).__name__
        self.model = model.eval().requires_grad_(False)
        self.policy_tokenizer, self.stop_ids = policy_tokenizer, set(stop_ids)
        shared = tokenizer is None or tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.tokenizer = None if shared else tokenizer
        if shared and model.config.vocab_size < len(policy_tokenizer):
            raise ValueError(
                f"the reward model knows {model.config.vocab_size} tokens, the policy's tokenizer has "
                f"{len(policy_tokenizer)}: give the reward model's own tokenizer in reward_processing_classes"
            )

    @torch.no_grad()
    def __call__(self, rollout: Completions) -> list[float]:
        sequences = (
            rollout.sequences
            if self.tokenizer is None
            else [self._translate(row, rollout) for row in range(len(rollout.sequences))]
        )
        self._check_length(max(map(len, sequences)))
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        # Classifiers that look for padding tokens instead of the mask would read past the end, or before it.
        pad_token_id = self.model.config.get_text_config().pad_token_id
        if pad_token_id is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, pad_token_id)
        device = self.model.device
        outputs = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        return outputs.logits[:, 0].float().tolist()

    def _translate(self, row: int, rollout: Completions) -> torch.Tensor:
        assert self.tokenizer is not None
        ids = rollout.sequences[row].tolist()
        ended = ids[-1] in self.stop_ids
        if isinstance(rollout.prompts[row], list) and self.tokenizer.chat_template is not None:
            text = self.tokenizer.apply_chat_template(rollout.prompts[row] + rollout.completions[row], tokenize=False)
            translated = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            text = self.policy_tokenizer.decode(ids, skip_special_tokens=True)
            translated = self.tokenizer(text).input_ids
            eos = self.tokenizer.eos_token_id
            if ended and eos is not None and (not translated or translated[-1] != eos):
                translated = [*translated, eos]
        return torch.tensor(translated)

    def _check_length(self, length: int) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(
                f"prompt and completion are {length} tokens of the reward model's, which reads {longest}: lower "
                "max_prompt_length or max_completion_length"
            )


class FunctionReward:
    """A Python function as TRL's GRPOTrainer takes it: `f(prompts, completions, completion_ids, **columns)`."""

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)

    def __call__(self, rollout: Completions) -> list[float]:
        try:
            scores = self.function(
                prompts=rollout.prompts,
                completions=rollout.completions,
                completion_ids=rollout.completion_ids,
                **rollout.columns,
            )
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"the reward function {self.name} raised {type(error).__name__}: {error} ({where.filename}, line "
                f"{where.lineno}). The first of its {len(rollout.completions)} completions was "
                f"{rollout.completions[0]!r}"
            ) from error
        return scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)


def load_rewards(
    rewards: Reward | list[Reward],
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> list[RewardModel | FunctionReward]:
    """The rewards ready to call; a path is loaded with its tokenizer."""
    rewards = rewards if isinstance(rewards, list) else [rewards]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(rewards)
    if not rewards:
        raise ValueError("reward_funcs is empty: give a reward model or a function")
    if len(tokenizers) != len(rewards):
        raise ValueError(f"there are {len(rewards)} rewards and {len(tokenizers)} reward_processing_classes")
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


def reward_function(name: str) -> RewardFunction:
    """The function `module:function`, its module looked for in the current folder, too.

    Raises:
        UserError: there is none.
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
        raise UserError(f"--reward {name}: give MODULE:FUNCTION, such as rewards:politeness of a rewards.py here")
    return function


def reward_of(settings: OnlineSettings) -> str:
    """The folder or function that the settings name; for the bundled data there is one."""
    if settings.reward_model is None and settings.reward is None and settings.data == bundled.NAME:
        return f"{bundled.__name__}:{bundled.whole_sentence.__name__}"
    return settings.reward_model or settings.reward or ""


def check_reward(settings: OnlineSettings) -> list[str]:
    """What is wrong with a choice of reward, as far as it can be known before it is loaded."""
    if not reward_of(settings) or (settings.reward_model is not None and settings.reward is not None):
        return ["give one of --reward-model FOLDER and --reward MODULE:FUNCTION"]
    if settings.reward_model is not None and not (Path(settings.reward_model) / "config.json").is_file():
        return [f"--reward-model: {settings.reward_model} holds no model (no config.json)"]
    return []


def score(reward: RewardModel | FunctionReward, rollout: Completions) -> torch.Tensor:
    """One finite number per completion (rows,).

    Raises:
        RewardError: the reward raised, gave another number of scores, or one that is not a finite number.
    """
    scores = reward(rollout)
    expected = len(rollout.completions)
    if len(scores) != expected:
        raise RewardError(f"the reward {reward.name} gave {len(scores)} scores for {expected} completions")
    for row, value in enumerate(scores):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(
                f"the reward {reward.name} gave {value!r} for the completion {rollout.completions[row]!r} of the prompt "
                f"{rollout.prompts[row]!r}; a score is a finite number"
            )
    return torch.tensor([float(value) for value in scores])
