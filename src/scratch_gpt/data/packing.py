"""Packing: how the documents of one source are cut into rows of ``context_length`` targets.

A row is a list of segments ``(first, count)``: the ring's positions of its targets. The input of each target is the
token just before it, so a document's first token is predicted from the end-of-text token of the document before: that
token is the beginning of every document, as it is in generation. Either packing makes every token of every document a
target exactly once per epoch, whether or not documents are masked from each other.

``concat``: windows of the ring, cut from a point that changes with each epoch; no padding but in an epoch's last row.
``best_fit``: documents stay whole where they fit into a row (Ding et al., 2024, arXiv:2404.10830). A longer document
gives full rows and a rest, and documents and rests share rows, by best fit, longest first. Rows end in padding.

With ``document_mask`` attention ends at a document's edge, and positions restart there. The model reads the mask from
the positions, so without it positions run through the whole row, also where documents meet.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from scratch_gpt.data.permutation import Permutation, random_integer
from scratch_gpt.data.shards import TokenStream

PackingName = Literal["concat", "best_fit"]
Row = list[tuple[int, int]]
"""Segments (position of the first target in the ring, number of targets), at most ``context_length`` targets in all."""

DOCUMENTS_PER_WINDOW = 2**18
"""Documents that may share rows: bounds the memory of packing. Far above what a good fit needs."""


class Packing(Protocol):
    """The rows of one source: epoch after epoch, each epoch all rows in an order of its own."""

    num_tokens: int
    rows_per_epoch: int

    def row(self, index: int) -> Row:
        """Row ``index`` of an endless run: a pure function of it and the key."""


def pack(
    stream: TokenStream, packing: PackingName, context_length: int, document_mask: bool, *key: int | str
) -> Packing:
    """The rows of ``stream`` as the run's ``key`` shuffles them."""
    if packing == "best_fit":
        return BestFit(stream, context_length, *key)
    return Concat(stream, context_length, document_mask, *key)


class Concat:
    """Windows of the ring. With ``document_mask`` a row's segments end where documents end."""

    def __init__(self, stream: TokenStream, context_length: int, document_mask: bool, *key: int | str):
        self.num_tokens, self.context_length, self.key = len(stream), context_length, key
        self.rows_per_epoch = -(-self.num_tokens // context_length)
        self._split: Callable[[int, int], Row] = (
            DocumentEdges(stream).split if document_mask else lambda first, count: [(first, count)]
        )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[int, Permutation]:
        start = random_integer(*self.key, epoch, "start") % self.num_tokens
        return start, Permutation(self.rows_per_epoch, *self.key, epoch)

    def row(self, index: int) -> Row:
        epoch, within = divmod(index, self.rows_per_epoch)
        start, permutation = self._epoch(epoch)
        offset = permutation(within) * self.context_length
        return self._split((start + offset) % self.num_tokens, min(self.context_length, self.num_tokens - offset))


class BestFit:
    """Whole documents. Which of them share a row is the same in every epoch; the order of the rows is not.

    The index is computed from the document lengths when the run starts, a third of a second per million documents, and
    holds 20 bytes per document or part of one, and 8 per row.
    """

    def __init__(self, stream: TokenStream, context_length: int, *key: int | str):
        self.num_tokens, self.key = len(stream), key
        self.firsts, self.counts, self.row_starts = best_fit_rows(
            stream.document_starts(), self.num_tokens, context_length
        )
        self.rows_per_epoch = len(self.row_starts) - 1
        self.waste = 1 - self.num_tokens / (self.rows_per_epoch * context_length)
        """Share of padding."""
        self._epoch = lru_cache(maxsize=2)(lambda epoch: Permutation(self.rows_per_epoch, *key, epoch))

    def row(self, index: int) -> Row:
        epoch, within = divmod(index, self.rows_per_epoch)
        row = self._epoch(epoch)(within)
        pieces = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return list(zip(self.firsts[pieces].tolist(), self.counts[pieces].tolist(), strict=True))


class DocumentEdges:
    """Cuts a stretch of the ring where documents begin."""

    def __init__(self, stream: TokenStream):
        self.starts, self.num_tokens = stream.document_starts(), len(stream)

    def split(self, first: int, count: int) -> Row:
        """The stretch of ``count`` targets from ``first`` on as one segment per document; it may wrap."""
        segments: Row = []
        while count > 0:
            stretch = min(count, self.num_tokens - first)
            inside = slice(*np.searchsorted(self.starts, [first + 1, first + stretch]))
            edges = [first, *self.starts[inside].tolist(), first + stretch]
            segments += [(edge, following - edge) for edge, following in pairwise(edges)]
            first, count = 0, count - stretch
        return segments


def best_fit_rows(
    starts: np.ndarray, num_tokens: int, context_length: int, window: int = DOCUMENTS_PER_WINDOW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(firsts (pieces,) int64, counts (pieces,) int32, row_starts (rows + 1,) int64) of documents beginning at ``starts``.

    Row r holds the pieces ``row_starts[r]`` to ``row_starts[r + 1]``, in the order of the ring.
    """
    firsts, counts, pieces_per_row = [], [], []
    for begin in range(0, len(starts), window):
        documents = starts[begin : begin + window]
        end = num_tokens if begin + window >= len(starts) else starts[begin + window]
        lengths = np.diff(documents, append=end)
        pieces = -(-lengths // context_length)  # full rows and a rest
        owner = np.repeat(np.arange(len(documents)), pieces)
        offset = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * context_length
        count = np.minimum(context_length, lengths[owner] - offset)
        rows = best_fit(count, context_length)
        order = np.argsort(rows, kind="stable")
        firsts.append((documents[owner] + offset)[order])
        counts.append(count[order].astype(np.int32))
        pieces_per_row.append(np.bincount(rows))
    row_starts = np.concatenate([[0], np.cumsum(np.concatenate(pieces_per_row))])
    return np.concatenate(firsts), np.concatenate(counts), row_starts


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, (pieces,) int64, by best-fit decreasing.

    Longest first, each piece goes into the row that it leaves the least space in, else into a new row. Pieces of one
    length are placed together: all rows with the same space take as many of them as they can, so the work grows with
    the number of different lengths and not with the number of pieces.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    num_rows = 0
    with_space: dict[int, list[np.ndarray]] = {}  # rows by the space that is left in them
    occupied = np.zeros(capacity + 1, dtype=bool)  # its keys

    def leave(space: int, group: np.ndarray) -> None:
        if len(group) and space:
            with_space.setdefault(space, []).append(group)
            occupied[space] = True

    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order], append=0)) + 1
    for pieces in np.split(order, ends[:-1]):  # of one length
        length = int(lengths[pieces[0]])
        while len(pieces):
            space = length + int(occupied[length:].argmax())
            if occupied[space]:
                candidates = np.concatenate(with_space.pop(space))
                occupied[space] = False
            else:
                space = capacity
                candidates = num_rows + np.arange(-(-len(pieces) // (capacity // length)))
                num_rows += len(candidates)
            each = space // length
            full = min(len(pieces) // each, len(candidates))
            rest = len(pieces) - full * each if full < len(candidates) else 0
            placed = full * each + rest
            rows[pieces[:placed]] = np.repeat(candidates[: full + 1], each)[:placed]
            pieces = pieces[placed:]
            leave(space - each * length, candidates[:full])
            if rest:
                leave(space - rest * length, candidates[full : full + 1])
                full += 1
            leave(space, candidates[full:])
    return rows
