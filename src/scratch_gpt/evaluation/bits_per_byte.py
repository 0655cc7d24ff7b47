"""Loss and bits per byte of a causal language model on a text."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scratch_gpt.data.batches import IGNORE_INDEX, Batch, evaluation_batches
from scratch_gpt.data.shards import TokenStream

LOGITS_PER_BATCH = 2**26
"""Bound on batch * seq * vocabulary, to keep the logits of a validation batch to a few hundred MB."""


@dataclass(frozen=True)
class Validation:
    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float
    """Cross-entropy of the whole text in bits over its UTF-8 bytes: comparable between tokenizers."""


def as_validation(total_nats: float, targets: float, num_bytes: int) -> Validation:
    return Validation(loss=total_nats / targets, bits_per_byte=total_nats / math.log(2) / num_bytes)


Score = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]


def score_batch(model: nn.Module, batch: Batch, attention_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies of a batch in nats, and the number of its targets. Takes any causal language model."""
    logits = model(
        batch.input_ids, attention_mask=attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    nats = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return nats, (batch.targets != IGNORE_INDEX).sum()


@torch.no_grad()
def score_stream(
    model: nn.Module,
    stream: TokenStream,
    context_length: int,
    vocab_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    document_mask: bool = False,
    score: Score = score_batch,
) -> torch.Tensor:
    """Sum of the cross-entropies in nats and number of targets (2,), float64, over every ``world_size``-th batch.

    Where a model is sharded, all ranks must call it equally often: a rank without a batch left computes that of the first
    rank once more, and does not count it.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch_size = max(1, min(32, LOGITS_PER_BATCH // (context_length * vocab_size)))
    sums = torch.zeros(2, dtype=torch.float64)
    batches = evaluation_batches(stream, context_length, batch_size, document_mask)
    for group in iter(lambda: list(itertools.islice(batches, world_size)), []):
        counts = rank < len(group)
        nats, targets = score(model, group[rank if counts else 0].to(device))
        if counts:
            sums += torch.tensor([nats.item(), targets.item()], dtype=torch.float64)
    model.train(was_training)
    return sums
