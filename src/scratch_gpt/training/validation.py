"""Validation loss and bits per byte on held-out text."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scratch_gpt.data.batches import IGNORE_INDEX, Batch, evaluation_batches
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.training.layout import Layout
from scratch_gpt.training.pipeline import Pipeline
from scratch_gpt.training.precision import autocast

LOGITS_PER_BATCH = 2**26
"""Bound on batch * seq * vocabulary, to keep the logits of a validation batch to a few hundred MB."""


@dataclass(frozen=True)
class Validation:
    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float
    """Cross-entropy of the whole text in bits over its UTF-8 bytes: comparable between tokenizers."""


def validate(
    layout: Layout,
    model: nn.Module,
    streams: Mapping[str, TokenStream],
    context_length: int,
    precision: str,
    document_mask: bool = False,
) -> tuple[Validation, dict[str, Validation]]:
    """Score the text of all sources and of each, with all processes of a run, in the run's precision.

    Each process takes a share of the batches. ``document_mask``: as the model was trained.
    """
    vocab_size = layout.unwrap(model).config.vocab_size
    with autocast(layout.device.type, precision):
        nats = [
            sum_of_losses(
                model,
                stream,
                context_length,
                vocab_size,
                layout.data_rank,
                layout.data_size,
                document_mask,
                lambda batch: layout.own_part(batch, model),
            )
            for stream in streams.values()
        ]
    layout.after_evaluation(model)
    sums = layout.sum(torch.stack(nats).to(layout.device))  # (sources, 2)
    by_source = {
        name: as_validation(total, targets, stream.num_bytes)
        for (name, stream), (total, targets) in zip(streams.items(), sums.tolist(), strict=True)
    }
    total, targets = sums.sum(0).tolist()
    return as_validation(total, targets, sum(stream.num_bytes for stream in streams.values())), by_source


def as_validation(total_nats: float, targets: float, num_bytes: int) -> Validation:
    return Validation(loss=total_nats / targets, bits_per_byte=total_nats / math.log(2) / num_bytes)


@torch.no_grad()
def sum_of_losses(
    model: nn.Module,
    stream: TokenStream,
    context_length: int,
    vocab_size: int,
    share: int = 0,
    shares: int = 1,
    document_mask: bool = False,
    own_part: Callable[[Batch], tuple[Batch, Any]] = lambda batch: (batch, None),
) -> torch.Tensor:
    """(sum of cross-entropies in nats, number of targets), float64, over every ``shares``-th batch of ``stream``.

    Where a model is sharded all processes must compute as often: one without a batch left takes part with another's.
    ``own_part``: see :meth:`Layout.own_part`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch_size = max(1, min(32, LOGITS_PER_BATCH // (context_length * vocab_size)))
    nats = torch.zeros(2, dtype=torch.float64)
    batches = evaluation_batches(stream, context_length, batch_size, document_mask)
    for some in iter(lambda: list(itertools.islice(batches, shares)), []):
        mine = share < len(some)
        batch, attention_mask = own_part(some[share if mine else 0].to(device))
        if isinstance(model, Pipeline):
            loss = model.sum_of_losses(batch)
        else:
            loss = _sum_of_losses(model, batch, attention_mask)
        if mine:
            nats += torch.tensor([loss.item(), (batch.labels != IGNORE_INDEX).sum().item()], dtype=torch.float64)
    model.train(was_training)
    return nats


def _sum_of_losses(model: nn.Module, batch: Batch, attention_mask: Any) -> torch.Tensor:
    """Any model of transformers will do."""
    logits = model(
        batch.input_ids, attention_mask=attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
