"""Validation loss and bits per byte on held-out text."""

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


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, stream: TokenStream, context_length: int) -> Validation:
    """Score every token of ``stream`` once, in rows of ``context_length``, each process a share of the batches."""
    was_training = model.training
    model.eval()
    vocab_size = accelerator.unwrap_model(model).config.vocab_size
    batch_size = max(1, min(32, LOGITS_PER_BATCH // (context_length * vocab_size)))
    nats = torch.zeros(2, dtype=torch.float64)  # sum of cross-entropies, number of targets
    for number, batch in enumerate(evaluation_batches(stream, context_length, batch_size)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        with accelerator.autocast():
            logits = model(batch.input_ids.to(accelerator.device), use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            batch.labels.to(accelerator.device).flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        nats += torch.tensor([losses.item(), (batch.labels != IGNORE_INDEX).sum().item()], dtype=torch.float64)
    total, targets = accelerator.reduce(nats.to(accelerator.device), "sum").tolist()
    model.train(was_training)
    return Validation(loss=total / targets, bits_per_byte=total / math.log(2) / stream.num_bytes)
