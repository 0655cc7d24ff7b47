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

MAX_LOGITS_PER_BATCH = 2**26
"""Limit on batch * seq * vocabulary, which keeps the logits of a batch to a few hundred MB."""


@dataclass(frozen=True)
class TextScore:
    """Loss of a model on a text."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float
    """Cross-entropy of the full text in bits, divided by its UTF-8 bytes: comparable between tokenizers."""


def to_text_score(total_nats: float, num_targets: float, num_bytes: int) -> TextScore:
    """The means of a summed cross-entropy over ``num_targets`` tokens of a text of ``num_bytes`` bytes."""
    return TextScore(loss=total_nats / num_targets, bits_per_byte=total_nats / math.log(2) / num_bytes)


BatchScorer = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
"""(model, batch) to the summed cross-entropy in nats and the number of targets."""


def score_batch(model: nn.Module, batch: Batch, attention_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of a batch in nats, and its number of targets, under any causal language model."""
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
    score: BatchScorer = score_batch,
) -> torch.Tensor:
    """Score every ``world_size``-th batch of ``stream``, starting with batch ``rank``.

    The collectives of a sharded model need all ranks to call it equally often: a rank that has no batch left computes the
    first rank's batch again, without counting it.

    Returns:
        (2,) float64: the summed cross-entropy in nats, and the number of targets.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch_size = max(1, min(32, MAX_LOGITS_PER_BATCH // (context_length * vocab_size)))
    sums = torch.zeros(2, dtype=torch.float64)
    batches = evaluation_batches(stream, context_length, batch_size, document_mask)
    for group in iter(lambda: list(itertools.islice(batches, world_size)), []):
        counts = rank < len(group)
        nats, targets = score(model, group[rank if counts else 0].to(device))
        if counts:
            sums += torch.tensor([nats.item(), targets.item()], dtype=torch.float64)
    model.train(was_training)
    return sums
