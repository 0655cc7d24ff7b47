"""Validation loss and bits per byte on held-out text."""

from collections.abc import Mapping

import torch
from torch import nn

from scratch_gpt.compute.precision import autocast
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.evaluation.bits_per_byte import TextScore, score_stream, to_text_score


def validate(
    strategy: Strategy,
    model: nn.Module,
    streams: Mapping[str, TokenStream],
    context_length: int,
    precision: str,
    document_mask: bool = False,
) -> tuple[TextScore, dict[str, TextScore]]:
    """Score the held-out text on all ranks together, each taking every ``dp_size``-th batch.

    Args:
        streams: the held-out text of each source.
        precision: precision of the run.
        document_mask: whether documents are masked from one another, as in training.

    Returns:
        The score over all sources, and the score of each.
    """
    vocab_size = strategy.unwrap(model).config.vocab_size
    with autocast(strategy.device.type, precision):
        sums_by_source = [
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
    sums = strategy.all_reduce_sum(torch.stack(sums_by_source).to(strategy.device))  # (sources, 2)
    by_source = {
        name: to_text_score(nats, num_targets, stream.num_bytes)
        for (name, stream), (nats, num_targets) in zip(streams.items(), sums.tolist(), strict=True)
    }
    nats, num_targets = sums.sum(0).tolist()
    return to_text_score(nats, num_targets, sum(stream.num_bytes for stream in streams.values())), by_source
