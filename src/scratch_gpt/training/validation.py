"""Validation loss and bits per byte on held-out text."""

from collections.abc import Mapping

import torch
from torch import nn

from scratch_gpt.compute.precision import autocast
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.evaluation.bits_per_byte import Validation, as_validation, score_stream


def validate(
    strategy: Strategy,
    model: nn.Module,
    streams: Mapping[str, TokenStream],
    context_length: int,
    precision: str,
    document_mask: bool = False,
) -> tuple[Validation, dict[str, Validation]]:
    """Score the text of all sources and of each, with all processes of a run, in the run's precision.

    Each process takes a share of the batches. ``document_mask``: as the model was trained.
    """
    vocab_size = strategy.unwrap(model).config.vocab_size
    with autocast(strategy.device.type, precision):
        nats = [
            score_stream(
                model,
                stream,
                context_length,
                vocab_size,
                rank=strategy.dp_rank,
                world_size=strategy.dp_size,
                document_mask=document_mask,
                score=strategy.score,
            )
            for stream in streams.values()
        ]
    strategy.release_gathered_weights(model)
    sums = strategy.all_reduce_sum(torch.stack(nats).to(strategy.device))  # (sources, 2)
    by_source = {
        name: as_validation(total, targets, stream.num_bytes)
        for (name, stream), (total, targets) in zip(streams.items(), sums.tolist(), strict=True)
    }
    total, targets = sums.sum(0).tolist()
    return as_validation(total, targets, sum(stream.num_bytes for stream in streams.values())), by_source
