"""Deduplication and decontamination: find repeated documents, and documents that contain evaluation text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from scratch_gpt.data.inputs import kind_of
from scratch_gpt.data.records import read_json_lines
from scratch_gpt.data.sources import find_files, read_documents

NGRAM = 13
"""Consecutive words that count as the same text (Brown et al., 2020, arXiv:2005.14165, appendix C)."""

_WORD = re.compile(r"\w+")


def first_occurrences(digests: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return, for each array of document digests (uint64), a bool array: True at the first occurrence of a value."""
    joined = np.concatenate([*digests, np.empty(0, dtype=np.uint64)])
    keep = np.zeros(len(joined), dtype=bool)
    keep[np.unique(joined, return_index=True)[1]] = True
    return np.split(keep, np.cumsum([len(one) for one in digests])[:-1])


class Contamination:
    """Finds documents that share :data:`NGRAM` consecutive words with evaluation text; ignores case and punctuation."""

    def __init__(self, texts: Iterable[str]):
        self.numbers: dict[str, int] = {}  # ids of the words of evaluation texts, from 1
        ngrams: set[tuple[int, ...]] = set()
        for text in texts:
            words = [self.numbers.setdefault(word, len(self.numbers) + 1) for word in _words(text)]
            ngrams.update(zip(*(words[offset:] for offset in range(NGRAM)), strict=False))
        self.ngrams = ngrams
        self.weights = np.random.default_rng(0).integers(1, 2**63, NGRAM, dtype=np.uint64)
        rows = np.array(sorted(ngrams), dtype=np.uint64).reshape(-1, NGRAM)
        self.hashes = np.unique((rows * self.weights).sum(axis=1, dtype=np.uint64))

    def found_in(self, document: str) -> bool:
        """Return whether ``document`` shares an n-gram with the evaluation text."""
        numbers = np.array([self.numbers.get(word, 0) for word in _words(document)], dtype=np.uint64)
        if len(numbers) < NGRAM or not len(self.hashes):
            return False
        windows = np.lib.stride_tricks.sliding_window_view(numbers, NGRAM)  # (words - 12, 13)
        hashes = np.zeros(len(windows), dtype=np.uint64)
        for offset in range(NGRAM):
            hashes += numbers[offset : len(windows) + offset] * self.weights[offset]
        indices = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        candidates = np.flatnonzero(self.hashes[indices] == hashes)
        return any(tuple(windows[index].tolist()) in self.ngrams for index in candidates)


def evaluation_texts(files: Sequence[str]) -> Iterator[str]:
    """Yield the texts of evaluation files: documents of a text file; every string in a JSON Lines record.

    Raises:
        UserError: a file is missing or broken.
    """
    for name in files:
        for path in find_files(name):
            if kind_of(path) == "jsonl":
                for record in read_json_lines(path):
                    yield from _strings(record)
            else:
                yield from read_documents([path])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
