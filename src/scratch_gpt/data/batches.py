"""Rows of tokens, and the order in which training sees them.

An epoch cuts the circular token stream into rows of ``context_length`` targets from a point that changes with each
epoch, and visits the rows in a shuffled order. Every token is a target exactly once per epoch. Which tokens a step
reads is a pure function of (seed, step): nothing to save but the step, and any number of processes sees the same data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from scratch_gpt.data.shards import TokenStream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and the tokens that follow them, both (batch, seq) int64; targets to leave out are -100."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class RowOrder:
    """Where row ``index`` of an endless training run lies in a ring of ``num_tokens`` tokens."""

    def __init__(self, num_tokens: int, context_length: int, seed: int):
        self.num_tokens, self.context_length, self.seed = num_tokens, context_length, seed
        self.rows_per_epoch = -(-num_tokens // context_length)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        return int(random.integers(self.num_tokens)), random.permutation(self.rows_per_epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """(position of the row's first target in the ring, number of targets)."""
        epoch, within = divmod(index, self.rows_per_epoch)
        start, permutation = self._epoch(epoch)
        row = int(permutation[within])
        return (start + row * self.context_length) % self.num_tokens, self._targets(row)

    def num_targets(self, indices: Sequence[int]) -> int:
        return sum(self.locate(index)[1] for index in indices)

    def _targets(self, row: int) -> int:
        return min(self.context_length, self.num_tokens - row * self.context_length)


def read_rows(stream: TokenStream, rows: Sequence[tuple[int, int]], context_length: int) -> Batch:
    """The rows at (first target, number of targets): each input is the token just before its target."""
    tokens = np.stack([stream.read(first - 1, context_length + 1) for first, _ in rows])  # (batch, seq + 1)
    labels = tokens[:, 1:].copy()
    for row, (_, targets) in enumerate(rows):
        labels[row, targets:] = IGNORE_INDEX
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels))


def evaluation_batches(stream: TokenStream, context_length: int, batch_size: int) -> Iterator[Batch]:
    """The whole stream in order, every token a target exactly once."""
    rows = [(first, min(context_length, len(stream) - first)) for first in range(0, len(stream), context_length)]
    for beginning in range(0, len(rows), batch_size):
        yield read_rows(stream, rows[beginning : beginning + batch_size], context_length)
