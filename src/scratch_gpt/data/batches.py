"""Rows of tokens to tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scratch_gpt.data.packing import DocumentEdges, Row
from scratch_gpt.data.shards import TokenStream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and the tokens that follow them, both (batch, seq) int64; targets to leave out are -100.

    ``position_ids`` (batch, seq), where they restart, ask the model to keep documents apart; None: 0 to seq - 1.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """On ``device``, without waiting for the copy where the memory is pinned."""
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in self._tensors()))

    def pin_memory(self) -> "Batch":
        """In memory that CUDA devices copy from by themselves."""
        return Batch(*(t if t is None else t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.input_ids, self.targets, self.position_ids


def read_rows(rows: Sequence[tuple[TokenStream, Row]], context_length: int, document_mask: bool) -> Batch:
    """Each row's targets, and as inputs the token just before each. Padding is token 0, which nothing sees.

    With ``document_mask`` positions restart at each segment, and at the padding.
    """
    shape = (len(rows), context_length)
    input_ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64) if document_mask else None
    for number, (stream, row) in enumerate(rows):
        column = 0
        for first, count in row:
            tokens = stream.read(first - 1, count + 1)
            segment = slice(column, column + count)
            input_ids[number, segment], targets[number, segment] = tokens[:-1], tokens[1:]
            if position_ids is not None:
                position_ids[number, segment] = np.arange(count)
            column += count
        if position_ids is not None:
            position_ids[number, column:] = np.arange(context_length - column)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        None if position_ids is None else torch.from_numpy(position_ids),
    )


def evaluation_batches(
    stream: TokenStream, context_length: int, batch_size: int, document_mask: bool = False
) -> Iterator[Batch]:
    """The whole stream in order, every token a target exactly once."""
    edges = DocumentEdges(stream) if document_mask else None
    windows = [(first, min(context_length, len(stream) - first)) for first in range(0, len(stream), context_length)]
    for beginning in range(0, len(windows), batch_size):
        chosen = windows[beginning : beginning + batch_size]
        rows = [[window] if edges is None else edges.split(*window) for window in chosen]
        yield read_rows([(stream, row) for row in rows], context_length, document_mask)
