"""Completions drawn from a policy, and the probabilities of their tokens: one rule for both.

Nothing but the temperature stands between a model's logits and what is drawn, and the same temperature is in every
log-probability: a constraint on one side only (top-k, a minimum length, ...) would make the KL penalty negative, and the
policy would farm it.
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
    """Prompts padded on the left, completions on the right: every completion begins at the same column."""

    input_ids: torch.Tensor
    """(rows, prompt + completion)."""
    attention_mask: torch.Tensor
    """(rows, prompt + completion)."""
    completion_mask: torch.Tensor
    """(rows, completion): 1 up to the stop token, which counts, or to the end."""
    ended: torch.Tensor
    """(rows,): whether there is a stop token."""

    @property
    def completion_ids(self) -> torch.Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def first(self, count: int) -> "RolloutBatch":
        """The batch without the rows behind."""
        return RolloutBatch(*(getattr(self, part.name)[:count] for part in fields(self)))

    def sequences(self) -> list[torch.Tensor]:
        """Prompt and completion of each row, without padding, on the CPU."""
        rows = zip(self.input_ids.cpu(), self.attention_mask.cpu(), strict=True)
        return [ids[mask.bool()] for ids, mask in rows]


def completion_mask(completion_ids: torch.Tensor, stop_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens up to the first stop token, itself included (rows, seq), and whether there is one (rows,).

    Found by position, not by the id of the padding, which may be a stop token or drawn like any other.
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
    """Draw one completion per prompt, with the key/value cache. `generate` sees that a model is sharded, and goes on in all processes
    until the last is done."""
    base = unwrap_peft(model)
    width = max(map(len, prompt_ids))
    padded = [[pad_id] * (width - len(ids)) + ids for ids in prompt_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
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
    with _only(base, config):
        sequences = base.generate(input_ids=input_ids, attention_mask=attention_mask)
    completions, ended = completion_mask(sequences[:, width:], stop_ids)
    return RolloutBatch(sequences, torch.cat([attention_mask, completions], 1), completions, ended)


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generate by ``config`` alone: `generate` would fill what it leaves open from the model's own configuration."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def concatenate(batches: list[RolloutBatch], pad_id: int) -> RolloutBatch:
    """Batches of different prompt and completion lengths as one."""
    prompt = max(batch.input_ids.shape[1] - batch.completion_mask.shape[1] for batch in batches)
    completion = max(batch.completion_mask.shape[1] for batch in batches)

    def widen(tensor: torch.Tensor, batch: RolloutBatch, value: int) -> torch.Tensor:
        right = completion - batch.completion_mask.shape[1]
        return F.pad(tensor, (prompt + completion - tensor.shape[1] - right, right), value=value)

    return RolloutBatch(
        torch.cat([widen(batch.input_ids, batch, pad_id) for batch in batches]),
        torch.cat([widen(batch.attention_mask, batch, 0) for batch in batches]),
        torch.cat(
            [F.pad(batch.completion_mask, (0, completion - batch.completion_mask.shape[1])) for batch in batches]
        ),
        torch.cat([batch.ended for batch in batches]),
    )


def position_arguments(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position of each token in its own row, whatever the padding before it, as `generate` counts; where models ask."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}


def completion_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int, temperature: float
) -> torch.Tensor:
    """The logits, by temperature, that each completion token was drawn from (rows, completion, vocabulary), in float32."""
    base = unwrap_peft(model)
    arguments: dict[str, Any] = position_arguments(base, attention_mask)
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        arguments["logits_to_keep"] = completion_length + 1
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments).logits
    return logits[:, -completion_length - 1 : -1].float() / temperature


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token (rows, seq) under its logits (rows, seq, vocabulary)."""
    return -F.cross_entropy(logits.flatten(0, 1), token_ids.flatten(), reduction="none").view(token_ids.shape)


@torch.no_grad()
def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the distribution at each position, in nats (rows, seq)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)
