"""Completions of a policy, and the log-probabilities of their tokens.

The temperature is all that changes a model's logits before sampling, and the same temperature is in every log-probability. A
constraint on sampling alone (top-k, a minimum length, ...) would make the KL estimate negative, and the policy would learn to
exploit that.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from scratch_gpt.alignment.models import unwrap_peft


@dataclass
class RolloutBatch:
    """Prompts, padded on the left, and completions, padded on the right: all completions begin at the same position."""

    input_ids: torch.Tensor
    """(sequences, prompt + completion)."""
    attention_mask: torch.Tensor
    """(sequences, prompt + completion)."""
    completion_mask: torch.Tensor
    """(sequences, completion): 1 up to and including the stop token, or to the end."""
    ended: torch.Tensor
    """(sequences,): whether the completion has a stop token."""

    @property
    def completion_ids(self) -> torch.Tensor:
        """(sequences, completion)."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def first(self, count: int) -> "RolloutBatch":
        """Return the first ``count`` sequences."""
        return RolloutBatch(*(getattr(self, field.name)[:count] for field in fields(self)))

    def sequences(self) -> list[torch.Tensor]:
        """Return the ids of each prompt and its completion, without padding, on the CPU."""
        padded = zip(self.input_ids.cpu(), self.attention_mask.cpu(), strict=True)
        return [ids[mask.bool()] for ids, mask in padded]


@dataclass
class ScoredBatch:
    """Completions and what the models say of them; unless noted, tensors are (sequences, completion)."""

    batch: RolloutBatch
    logprobs: torch.Tensor
    """Under the policy that generated them."""
    ref_logprobs: torch.Tensor
    """Under the reference model."""
    entropies: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    """(sequences, rewards): before normalization, without the KL penalty."""

    def first(self, count: int) -> "ScoredBatch":
        """Return the first ``count`` sequences."""
        tensors = (self.logprobs, self.ref_logprobs, self.entropies, self.values, self.scores)
        return ScoredBatch(self.batch.first(count), *(tensor[:count] for tensor in tensors))


@dataclass
class Rollout:
    """Completions of one rank, and the targets that are learned from them; tensors are (sequences, completion)."""

    batch: RolloutBatch
    logprobs: torch.Tensor
    """Under the policy that generated them."""
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    order: torch.Tensor
    """(PPO epochs, sequences): the order in which each epoch takes the sequences."""
    num_tokens: torch.Tensor
    """(PPO epochs, mini-batches): completion tokens in each mini-batch, over all ranks."""


def completion_mask(completion_ids: torch.Tensor, stop_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask the tokens up to and including the first stop token, (sequences, completion); and say if there is one.

    Padding is found by its position, not by its id, which may be a stop token or sampled like any other.
    """
    is_stop = torch.isin(completion_ids, torch.tensor(list(stop_ids), device=completion_ids.device))
    stops_before = is_stop.cumsum(1) - is_stop.long()
    return (stops_before == 0).long(), is_stop.any(1)


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: list[list[int]],
    *,
    max_completion_length: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> RolloutBatch:
    """Sample one completion per prompt, with the key/value cache.

    For a sharded model, transformers keeps generating on all ranks until the last one has finished.
    """
    base = unwrap_peft(model)
    prompt_length = max(map(len, prompt_ids))
    padded = [[pad_id] * (prompt_length - len(ids)) + ids for ids in prompt_ids]
    mask = [[0] * (prompt_length - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    input_ids = torch.tensor(padded, device=base.device)
    attention_mask = torch.tensor(mask, device=base.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_completion_length,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _generation_config(base, config):
        sequences = base.generate(input_ids=input_ids, attention_mask=attention_mask)
    completions, ended = completion_mask(sequences[:, prompt_length:], stop_ids)
    return RolloutBatch(sequences, torch.cat([attention_mask, completions], 1), completions, ended)


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own configuration, from which `generate` would fill in what ``config`` leaves unset."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def concatenate(batches: list[RolloutBatch], pad_id: int) -> RolloutBatch:
    """Join batches of different prompt and completion lengths into one."""
    prompt = max(batch.input_ids.shape[1] - batch.completion_mask.shape[1] for batch in batches)
    completion = max(batch.completion_mask.shape[1] for batch in batches)

    def pad(tensor: torch.Tensor, batch: RolloutBatch, value: int) -> torch.Tensor:
        right = completion - batch.completion_mask.shape[1]
        return F.pad(tensor, (prompt + completion - tensor.shape[1] - right, right), value=value)

    return RolloutBatch(
        torch.cat([pad(batch.input_ids, batch, pad_id) for batch in batches]),
        torch.cat([pad(batch.attention_mask, batch, 0) for batch in batches]),
        torch.cat(
            [F.pad(batch.completion_mask, (0, completion - batch.completion_mask.shape[1])) for batch in batches]
        ),
        torch.cat([batch.ended for batch in batches]),
    )


def position_arguments(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count positions from each sequence's first token, as `generate` does; for models that take `position_ids`."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}


def completion_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, temperature: float
) -> torch.Tensor:
    """Return the logits that each completion token is sampled from, over the temperature, in float32.

    (sequences, completion_length, vocabulary).
    """
    base = unwrap_peft(model)
    arguments: dict[str, Any] = position_arguments(base, attention_mask)
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        arguments["logits_to_keep"] = completion_length + 1
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments).logits
    return logits[:, -completion_length - 1 : -1].float() / temperature


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token (sequences, seq) under its logits (sequences, seq, vocabulary)."""
    return -F.cross_entropy(logits.flatten(0, 1), token_ids.flatten(), reduction="none").view(token_ids.shape)


@torch.no_grad()
def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the distribution at each position, in nats (sequences, seq)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)
