"""Pack the documents of one source into sequences of ``context_length`` targets.

A packed sequence is a list of segments ``(first, count)``: positions of its targets in the source's circular token
stream. The input of each target is the token just before it, so a document's first token is predicted from the
end-of-text token of the previous document: that token begins every document, as it does in generation. Both packings
make every token of every document a target exactly once per epoch, with or without a document mask.

``concat``: windows of the stream, from an offset that changes with each epoch; only an epoch's last sequence is padded.
``best_fit``: a document is not split if it fits into one sequence (Ding et al., 2024, arXiv:2404.10830). A longer
document is split into full sequences and a remainder; documents and remainders are combined by best fit, longest first,
and sequences are padded at the end.

With ``document_mask`` attention stops at document boundaries and position ids restart there. The model derives the mask
from the position ids, so without a document mask they run from 0 to the end of the sequence across documents.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from scratch_gpt.data.permutation import Permutation, random_integer
from scratch_gpt.data.shards import TokenStream

PackingName = Literal["concat", "best_fit"]
PackedSequence = list[tuple[int, int]]
"""Segments (position of the first target in the stream, number of targets); ``context_length`` targets at most."""

DOCUMENTS_PER_WINDOW = 2**18
"""Documents packed together. Limits the memory of packing; a good fit needs far fewer."""


class Packing(Protocol):
    """The sequences of one source, epoch after epoch; each epoch holds all of them in a new order."""

    num_tokens: int
    sequences_per_epoch: int

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence ``index``, counted over all epochs. A pure function of the index and the key."""


def pack(
    stream: TokenStream, packing: PackingName, context_length: int, document_mask: bool, *key: int | str
) -> Packing:
    """Pack ``stream`` and shuffle its sequences by ``key`` (the seed and the source's name)."""
    if packing == "best_fit":
        return BestFit(stream, context_length, *key)
    return Concat(stream, context_length, document_mask, *key)


class Concat:
    """Windows of the token stream. With ``document_mask`` segments end at document boundaries."""

    def __init__(self, stream: TokenStream, context_length: int, document_mask: bool, *key: int | str):
        self.num_tokens, self.context_length, self.key = len(stream), context_length, key
        self.sequences_per_epoch = -(-self.num_tokens // context_length)
        self._split: Callable[[int, int], PackedSequence] = (
            DocumentEdges(stream).split if document_mask else lambda first, count: [(first, count)]
        )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[int, Permutation]:
        start = random_integer(*self.key, epoch, "start") % self.num_tokens
        return start, Permutation(self.sequences_per_epoch, *self.key, epoch)

    def sequence(self, index: int) -> PackedSequence:
        epoch, within = divmod(index, self.sequences_per_epoch)
        start, permutation = self._epoch(epoch)
        offset = permutation(within) * self.context_length
        return self._split((start + offset) % self.num_tokens, min(self.context_length, self.num_tokens - offset))


class BestFit:
    """Unsplit documents where possible. Sequences hold the same documents in every epoch; only their order changes.

    The index is computed from the document lengths at start-up (a third of a second per million documents) and takes
    20 bytes per segment and 8 per sequence.
    """

    def __init__(self, stream: TokenStream, context_length: int, *key: int | str):
        self.num_tokens, self.key = len(stream), key
        self.firsts, self.counts, self.sequence_starts = best_fit_sequences(
            stream.document_starts(), self.num_tokens, context_length
        )
        self.sequences_per_epoch = len(self.sequence_starts) - 1
        self.waste = 1 - self.num_tokens / (self.sequences_per_epoch * context_length)
        """Fraction of positions that are padding."""
        self._epoch = lru_cache(maxsize=2)(lambda epoch: Permutation(self.sequences_per_epoch, *key, epoch))

    def sequence(self, index: int) -> PackedSequence:
        epoch, within = divmod(index, self.sequences_per_epoch)
        index = self._epoch(epoch)(within)
        segments = slice(int(self.sequence_starts[index]), int(self.sequence_starts[index + 1]))
        return list(zip(self.firsts[segments].tolist(), self.counts[segments].tolist(), strict=True))


class DocumentEdges:
    """Splits a range of the token stream at document boundaries."""

    def __init__(self, stream: TokenStream):
        self.starts, self.num_tokens = stream.document_starts(), len(stream)

    def split(self, first: int, count: int) -> PackedSequence:
        """Return ``count`` targets starting at ``first`` as one segment per document; the range may wrap around."""
        segments: PackedSequence = []
        while count > 0:
            length = min(count, self.num_tokens - first)  # up to the end of the circular stream
            inside = slice(*np.searchsorted(self.starts, [first + 1, first + length]))
            edges = [first, *self.starts[inside].tolist(), first + length]
            segments += [(edge, following - edge) for edge, following in pairwise(edges)]
            first, count = 0, count - length
        return segments


def best_fit_sequences(
    starts: np.ndarray, num_tokens: int, context_length: int, window: int = DOCUMENTS_PER_WINDOW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack the documents that begin at ``starts`` by best fit.

    Returns ``firsts`` (segments,) int64, ``counts`` (segments,) int32 and ``sequence_starts`` (sequences + 1,) int64.
    Sequence s holds segments ``sequence_starts[s]`` to ``sequence_starts[s + 1]``, in the order of the stream.
    """
    firsts, counts, segments_per_sequence = [], [], []
    for begin in range(0, len(starts), window):
        documents = starts[begin : begin + window]
        end = num_tokens if begin + window >= len(starts) else starts[begin + window]
        lengths = np.diff(documents, append=end)
        segments = -(-lengths // context_length)  # full sequences and a remainder
        owner = np.repeat(np.arange(len(documents)), segments)
        offset = (np.arange(len(owner)) - np.repeat(np.cumsum(segments) - segments, segments)) * context_length
        count = np.minimum(context_length, lengths[owner] - offset)
        sequences = best_fit(count, context_length)
        order = np.argsort(sequences, kind="stable")
        firsts.append((documents[owner] + offset)[order])
        counts.append(count[order].astype(np.int32))
        segments_per_sequence.append(np.bincount(sequences))
    sequence_starts = np.concatenate([[0], np.cumsum(np.concatenate(segments_per_sequence))])
    return np.concatenate(firsts), np.concatenate(counts), sequence_starts


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each segment to a sequence by best-fit decreasing: (segments,) int64.

    Longest first, each segment goes into the sequence with the least space that suffices, or into a new one. Segments
    of one length are assigned together: all sequences with the same space take as many of them as fit, so the work
    grows with the number of different lengths, not with the number of segments.
    """
    sequences = np.empty(len(lengths), dtype=np.int64)
    num_sequences = 0
    with_space: dict[int, list[np.ndarray]] = {}  # remaining space -> sequences
    occupied = np.zeros(capacity + 1, dtype=bool)  # keys of with_space

    def keep_open(space: int, group: np.ndarray) -> None:
        if len(group) and space:
            with_space.setdefault(space, []).append(group)
            occupied[space] = True

    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order], append=0)) + 1
    for segments in np.split(order, ends[:-1]):  # of one length
        length = int(lengths[segments[0]])
        while len(segments):
            space = length + int(occupied[length:].argmax())
            if occupied[space]:
                candidates = np.concatenate(with_space.pop(space))
                occupied[space] = False
            else:
                space = capacity
                candidates = num_sequences + np.arange(-(-len(segments) // (capacity // length)))
                num_sequences += len(candidates)
            each = space // length
            full = min(len(segments) // each, len(candidates))
            rest = len(segments) - full * each if full < len(candidates) else 0
            placed = full * each + rest
            sequences[segments[:placed]] = np.repeat(candidates[: full + 1], each)[:placed]
            segments = segments[placed:]
            keep_open(space - each * length, candidates[:full])
            if rest:
                keep_open(space - rest * length, candidates[full : full + 1])
                full += 1
            keep_open(space, candidates[full:])
    return sequences
