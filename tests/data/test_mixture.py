"""Mixtures and phases: proportions, resume, and invalid settings."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.config import PhaseSettings
from scratch_gpt.data.mixture import DataOrder, DataPosition, Mixture, phase_at
from scratch_gpt.data.packing import pack
from scratch_gpt.errors import UserError
from tests.data.test_batches import read_run, stream_of, training_data

weights = st.floats(0.001, 1000).map(lambda weight: Fraction(repr(weight)))


def mixture_of(values):
    return Mixture({f"source {number}": value for number, value in enumerate(values)})


@settings(max_examples=200, deadline=None)
@given(values=st.lists(weights, min_size=1, max_size=8), start=st.integers(0, 10**12))
def test_every_source_is_within_one_sequence_of_its_proportion_at_any_point(values, start):
    mixture = mixture_of(values)
    tolerance = {1: 0, 2: Fraction(1, 2)}.get(len(values), 1 if len(values) <= 4 else Fraction(3, 2))
    counts = mixture.counts(start)
    for sequence in range(start, start + 100):
        assert sum(counts.values()) == sequence
        for source, count in counts.items():
            exact = sequence * mixture.proportions[source]
            assert abs(count - exact) <= tolerance
            if len(values) <= 4:  # rounded down or up
                assert count in (math.floor(exact), math.ceil(exact))
        source, index = mixture.locate(sequence)
        assert index == counts[source]  # no sequence of a source is skipped or repeated
        counts[source] += 1
        assert counts == mixture.counts(sequence + 1)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_proportions_that_are_integers_are_met_exactly(values):
    mixture = mixture_of(map(Fraction, values))
    expected = {f"source {number}": value for number, value in enumerate(values)}
    assert mixture.counts(sum(values)) == expected
    assert mixture.counts(7 * sum(values)) == {source: 7 * value for source, value in expected.items()}


def order_of(sizes, phases, packing="concat", context=8):
    streams = {name: stream_of([size // 10] * 10) for name, size in sizes.items()}
    packings = {name: pack(stream, packing, context, False, 0, name) for name, stream in streams.items()}
    return DataOrder(packings, phases)


def walk(order, steps, sequences_per_step=1, max_steps=None, cursor=None, first=0):
    cursor, located = cursor or DataPosition(), []
    for step in range(first, steps):
        cursor = order.at_step(cursor, step, max_steps or steps)
        located += [order.locate(cursor, index) for index in range(cursor.row, cursor.row + sequences_per_step)]
        cursor = DataPosition(cursor.row + sequences_per_step, cursor.phase, cursor.phase_row, cursor.taken)
    return located, cursor


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_without_weights_everything_is_read_once_per_epoch(packing):
    streams = {"a": stream_of([7, 50, 3]), "b": stream_of([11] * 20, first_token=1000)}
    data = training_data(streams, 8, packing)
    num_sequences = sum(packing.sequences_per_epoch for packing in data.order.packings.values())
    for epoch in (1, 2):
        seen, cursor = read_run(data, [1] * (num_sequences * epoch))
        assert data.order.epochs(cursor) == {"a": epoch, "b": epoch}
        tokens = [token for sequence in seen for token in sequence]
        assert sorted(tokens) == sorted([*range(60), *range(1000, 1220)] * epoch)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_weights_are_proportions_of_tokens_even_if_padding_differs(packing):
    # a fills 5 positions of a sequence of 8, b fills all 8
    streams = {"a": stream_of([5] * 40), "b": stream_of([8] * 40, first_token=1000)}
    data = training_data(streams, 8, packing, phases=[PhaseSettings("only", 1.0, {"a": 0.7, "b": 0.3})])
    sequences, cursor = read_run(data, [1] * 1000)
    tokens = [token for sequence in sequences for token in sequence]
    assert sum(token < 1000 for token in tokens) / len(tokens) == pytest.approx(0.7, abs=0.001)
    taken = data.order.taken(cursor)
    assert taken["a"] / 1000 == pytest.approx(0.7 if packing == "concat" else (0.7 / 5) / (0.7 / 5 + 0.3 / 8), abs=1e-3)


def test_a_phase_continues_each_source_and_ends_after_its_share_of_the_steps():
    phases = [
        PhaseSettings("pretrain", 0.75, {"a": 0.9, "b": 0.1}),
        PhaseSettings("mid-training", 0.25, {"b": 1, "c": 1}),
    ]
    order = order_of({"a": 1000, "b": 500, "c": 80}, phases)
    located, cursor = walk(order, 200, sequences_per_step=4)
    for source, expected in (("a", 540), ("b", 60 + 100), ("c", 100)):
        assert [index for name, index in located if name == source] == list(range(expected))
    assert {name for name, _ in located[:600]} == {"a", "b"}
    assert {name for name, _ in located[600:]} == {"b", "c"}
    assert cursor.phase == "mid-training"
    assert order.taken(cursor) == {"a": 540, "b": 160, "c": 100}
    assert order.epochs(cursor) == {"a": 540 / 125, "b": 160 / 63, "c": 10}


def test_extending_a_run_after_a_phase_began_skips_and_repeats_no_sequence():
    phases = [PhaseSettings("one", 0.5, {"a": 1, "b": 2}), PhaseSettings("two", 0.5, {"a": 3, "b": 1})]
    order = order_of({"a": 1000, "b": 500}, phases)
    located, cursor = walk(order, 15, 2, max_steps=20)
    assert cursor.phase == "two"
    more, cursor = walk(order, 40, 3, max_steps=40, cursor=cursor, first=15)  # step 15 of 40 is phase one again
    for source in "ab":
        indices = [index for name, index in located + more if name == source]
        assert indices == list(range(order.taken(cursor)[source]))


def test_phases_cover_the_steps():
    phases = [PhaseSettings("a", 0.5), PhaseSettings("b", 0.3), PhaseSettings("c", 0.2)]
    assert np.bincount([phase_at(step, 10, phases) for step in range(10)]).tolist() == [5, 3, 2]
    assert phase_at(99, 10, phases) == 2


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([PhaseSettings("x", 1.0, {"tales": 1})], "the mixture of x names tales, but the shards hold a, b"),
        ([PhaseSettings("x", 1.0, {"a": 0.0})], "weights must be 0 or more, not all 0"),
        ([PhaseSettings("x", 1.0, {"a": -1.0, "b": 2.0})], "weights must be 0 or more"),
        ([PhaseSettings("x", 1.0, {"a": float("nan")})], "weights must be 0 or more"),
        ([PhaseSettings("x", 0.6), PhaseSettings("y", 0.6)], "the shares are 0.6, 0.6; .* they must sum to 1"),
        ([PhaseSettings("x", 0.5), PhaseSettings("x", 0.5)], "every phase needs a different, non-empty name"),
    ],
)
def test_bad_mixtures_are_refused(phases, message):
    with pytest.raises(UserError, match=message):
        order_of({"a": 100, "b": 100}, phases)
