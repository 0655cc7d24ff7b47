"""Packing by best fit, against a textbook implementation."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.data.packing import BestFit, best_fit, best_fit_sequences
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.data.sources import read_documents
from scratch_gpt.data.tokenizer import load_tokenizer


def best_fit_one_by_one(lengths, capacity):
    """Textbook best-fit decreasing, one segment at a time; returns the space left in each sequence."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, index) for index, space in enumerate(spaces) if space >= length]
        index = min(fitting)[1] if fitting else len(spaces)
        if not fitting:
            spaces.append(capacity)
        spaces[index] -= length
    return spaces


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_assigning_segments_by_length_fills_sequences_as_one_by_one_does(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    sequences = best_fit(np.array(lengths), capacity)
    left = capacity - np.bincount(sequences, weights=lengths)
    assert sorted(left) == sorted(best_fit_one_by_one(lengths, capacity))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    context=st.integers(1, 40),
    window=st.sampled_from([1, 7, 1000]),
)
def test_documents_that_fit_are_not_split_and_no_token_is_lost(lengths, context, window):
    starts = np.cumsum([0, *lengths])
    firsts, counts, sequence_starts = best_fit_sequences(starts[:-1], int(starts[-1]), context, window)
    tokens = [token for first, count in zip(firsts, counts, strict=True) for token in range(first, first + count)]
    assert sorted(tokens) == list(range(starts[-1]))
    filled = np.add.reduceat(counts, sequence_starts[:-1])
    assert filled.max() <= context
    assert filled.min() > 0
    expected = sorted(-(-length // context) for length in lengths)
    owners = np.searchsorted(starts, firsts, side="right") - 1
    assert sorted(np.bincount(owners)) == expected  # no document is split more often than necessary
    for begin, end in pairwise(sequence_starts):
        assert (np.diff(firsts[begin:end]) > 0).all()


def test_the_number_of_sequences_is_minimal_for_pairs_that_fit():
    """In general best-fit decreasing uses at most 11/9 of the optimum plus a constant (Johnson, 1973)."""
    lengths = np.array([6, 4, 5, 5, 7, 3, 8, 2, 9, 1] * 30)  # pairs that fill 150 sequences of 10
    assert best_fit(lengths, 10).max() + 1 == 150


def test_packing_many_documents_wastes_less_than_0_2_percent():
    random = np.random.default_rng(0)
    lengths = np.maximum(1, random.lognormal(5.5, 1.0, 20_000)).astype(int)
    starts = np.cumsum([0, *lengths])
    _, _, sequence_starts = best_fit_sequences(starts[:-1], int(starts[-1]), 1024)
    waste = 1 - starts[-1] / ((len(sequence_starts) - 1) * 1024)
    assert waste < 0.002


def test_packing_stories_wastes_less_than_5_percent(shared_data, tokenizer_folder):
    path = shared_data / "corpora" / "tinystories-sample" / "stories.txt"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    backend = load_tokenizer(tokenizer_folder).backend_tokenizer
    stream = TokenStream.of_documents([(backend.encode(text).ids, 1) for text in read_documents([path])], 0)
    packing = BestFit(stream, 1024, 0)
    assert 0 <= packing.waste < 0.05  # stories of about half a sequence
    assert sum(count for index in range(packing.sequences_per_epoch) for _, count in packing.sequence(index)) == len(
        stream
    )
