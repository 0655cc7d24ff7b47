"""Validation loss and bits per byte on held-out text."""

import itertools
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from scratch_gpt.data.batches import IGNORE_INDEX, evaluation_batches
from scratch_gpt.data.shards import TokenStream

LOGITS_PER_BATCH = 2**26
"""Bound on batch * seq * vocabulary, to keep the logits of a validation batch to a few hundred MB."""


@dataclass(frozen=True)
class Validation:
    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float
    """Cross-entropy of the whole text in bits over its UTF-8 bytes: comparable between tokenizers."""


def validate(accelerator: Accelerator, model: nn.Module, stream: TokenStream, context_length: int) -> Validation:
    """Score ``stream`` with all processes of a run, each a share of the batches, in the run's precision."""
    vocab_size = accelerator.unwrap_model(model).config.vocab_size
    with accelerator.autocast():
        nats = sum_of_losses(
            model, stream, context_length, vocab_size, accelerator.process_index, accelerator.num_processes
        )
    total, targets = accelerator.reduce(nats.to(accelerator.device), "sum").tolist()
    return as_validation(total, targets, stream)


def as_validation(total_nats: float, targets: float, stream: TokenStream) -> Validation:
    return Validation(loss=total_nats / targets, bits_per_byte=total_nats / math.log(2) / stream.num_bytes)


@torch.no_grad()
def sum_of_losses(
    model: nn.Module, stream: TokenStream, context_length: int, vocab_size: int, share: int = 0, shares: int = 1
) -> torch.Tensor:
    """(sum of cross-entropies in nats, number of targets), float64, over every ``shares``-th batch of ``stream``."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch_size = max(1, min(32, LOGITS_PER_BATCH // (context_length * vocab_size)))
    nats = torch.zeros(2, dtype=torch.float64)
    batches = evaluation_batches(stream, context_length, batch_size)
    for batch in itertools.islice(batches, share, None, shares):
        logits = model(batch.input_ids.to(device), use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            batch.labels.to(device).flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        nats += torch.tensor([losses.item(), (batch.labels != IGNORE_INDEX).sum().item()], dtype=torch.float64)
    model.train(was_training)
    return nats
