"""Packed sequences to tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scratch_gpt.data.packing import DocumentEdges, PackedSequence
from scratch_gpt.data.shards import TokenStream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Input ids and next-token targets, both (batch, seq) int64; ignored targets are :data:`IGNORE_INDEX`.

    ``position_ids``, (batch, seq) int64, restart at each document, which masks documents from each other. None stands
    for 0 to seq - 1.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to ``device``, asynchronously if the memory is pinned."""
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in self._tensors()))

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, from which CUDA devices copy asynchronously."""
        return Batch(*(t if t is None else t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.input_ids, self.targets, self.position_ids


def read_sequences(
    sequences: Sequence[tuple[TokenStream, PackedSequence]], context_length: int, document_mask: bool
) -> Batch:
    """Read the targets of each sequence and, as inputs, the token before each. Padding is token 0 without a target.

    With ``document_mask`` position ids restart at each segment and at the padding.
    """
    shape = (len(sequences), context_length)
    input_ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64) if document_mask else None
    for number, (stream, sequence) in enumerate(sequences):
        position = 0
        for first, count in sequence:
            tokens = stream.read(first - 1, count + 1)
            segment = slice(position, position + count)
            input_ids[number, segment], targets[number, segment] = tokens[:-1], tokens[1:]
            if position_ids is not None:
                position_ids[number, segment] = np.arange(count)
            position += count
        if position_ids is not None:
            position_ids[number, position:] = np.arange(context_length - position)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        None if position_ids is None else torch.from_numpy(position_ids),
    )


def evaluation_batches(
    stream: TokenStream, context_length: int, batch_size: int, document_mask: bool = False
) -> Iterator[Batch]:
    """Yield the stream in order. Every token is a target exactly once; the last batch may be smaller."""
    edges = DocumentEdges(stream) if document_mask else None
    windows = [(first, min(context_length, len(stream) - first)) for first in range(0, len(stream), context_length)]
    for start in range(0, len(windows), batch_size):
        chosen = windows[start : start + batch_size]
        sequences = [[window] if edges is None else edges.split(*window) for window in chosen]
        yield read_sequences([(stream, sequence) for sequence in sequences], context_length, document_mask)
