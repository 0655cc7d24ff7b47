"""Tensors from rows; and the whole read half: which tokens training sees, against a count of every token."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.config import PhaseSettings
from scratch_gpt.data.batches import IGNORE_INDEX, evaluation_batches, read_rows
from scratch_gpt.data.loader import TrainingData
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.packing import pack
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.errors import UserError


def stream_of(lengths, shards=1, first_token=0):
    """Documents of these lengths in a ring whose tokens are their own positions, counted from ``first_token``."""
    starts = np.cumsum([0, *lengths])
    cuts = [int(starts[len(lengths) * number // shards]) for number in range(shards)] + [int(starts[-1])]
    bounds = [pair for pair in pairwise(cuts) if pair[0] < pair[1]]
    tokens = np.arange(starts[-1]) + first_token
    arrays = [tokens[begin:end] for begin, end in bounds]
    documents = [starts[:-1][(starts[:-1] >= begin) & (starts[:-1] < end)] - begin for begin, end in bounds]
    return TokenStream(arrays, num_bytes=1, documents=documents)


def training_data(streams, context, packing="concat", document_mask=False, seed=0, phases=None, vocab_size=10**9):
    packings = {name: pack(stream, packing, context, document_mask, seed, name) for name, stream in streams.items()}
    order = DataOrder(packings, phases or [PhaseSettings("pretrain")])
    return TrainingData(streams, order, context, document_mask, vocab_size)


def targets(batch):
    return batch.targets[batch.targets != IGNORE_INDEX].tolist()


def read_run(data, steps, world=1, micro_batches=1, cursor=None):
    """The targets of a run in the order of its rows, ``steps`` being (rows of the step, ...), and its cursor."""
    cursor, rows = cursor or DataPosition(), []
    for step, size in enumerate(steps):
        cursor = data.order.at_step(cursor, step, len(steps))
        parts = [data.read_step(cursor, size, micro_batches, process, world) for process in range(world)]
        labels = [torch.cat([batch.targets for batch in part.batches]) for part in parts]
        whole = torch.stack(labels, dim=1).flatten(0, 1)  # process p had rows p, p + world, ...
        assert {part.num_targets for part in parts} == {int((whole != IGNORE_INDEX).sum())}
        assert len({part.cursor.row for part in parts}) == 1
        rows += [[token for token in row if token != IGNORE_INDEX] for row in whole.tolist()]
        cursor = parts[0].cursor
    return rows, cursor


documents = st.lists(st.integers(1, 60), min_size=1, max_size=40)
packings = st.sampled_from([("concat", False), ("concat", True), ("best_fit", False), ("best_fit", True)])


@settings(max_examples=300, deadline=None)
@given(
    lengths=documents,
    shards=st.integers(1, 3),
    context=st.integers(1, 40),
    packing=packings,
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    world=st.sampled_from([1, 2, 3, 4]),
    micro_batches=st.integers(1, 3),
    stop=st.integers(0, 50),
)
def test_every_token_of_every_document_is_a_target_once_per_epoch(
    lengths, shards, context, packing, seed, epoch, world, micro_batches, stop
):
    """At any number of processes, any batch size that changes at any resume point, in any epoch."""
    stream = stream_of(lengths, shards)
    data = training_data({"text": stream}, context, *packing, seed=seed)
    rows = data.order.packings["text"].rows_per_epoch
    start = data.order.at_step(DataPosition(), 0, 1)
    start = DataPosition(epoch * rows, start.phase, 0, start.taken)

    reference, end = read_run(data, [1] * rows, cursor=start)  # one process, a row a step
    assert Counter(token for row in reference for token in row) == Counter(range(len(stream)))
    assert end.row == (epoch + 1) * rows
    assert data.order.epochs(end) == {"text": epoch + 1}

    size = world * micro_batches
    before = min(stop, rows) // size
    resumed, cursor = read_run(data, [size] * before, world, micro_batches, start)
    fresh = training_data({"text": stream}, context, *packing, seed=seed)  # another process, another batch size
    rest, cursor = read_run(fresh, [1] * (rows - before * size), cursor=cursor)
    assert resumed + rest == reference
    assert cursor == end


@settings(max_examples=100, deadline=None)
@given(lengths=documents, context=st.integers(1, 40), packing=packings)
def test_inputs_precede_their_targets_and_positions_count_from_the_document(lengths, context, packing):
    """The input of a target is the token before it, that of a document's first target the end of another document."""
    stream, starts = stream_of(lengths), set(np.cumsum([0, *lengths]).tolist())
    data = training_data({"text": stream}, context, *packing)
    cursor = data.order.at_step(DataPosition(), 0, 1)
    rows = data.order.packings["text"].rows_per_epoch
    assert all(count > 0 for index in range(rows) for _, count in data.order.packings["text"].row(index))
    [batch] = data.read_step(cursor, rows, 1).batches
    real = batch.targets != IGNORE_INDEX
    assert torch.equal(((batch.input_ids + 1) % len(stream))[real], batch.targets[real])
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    if not packing[1]:
        assert batch.position_ids is None
        return
    for labels, positions in zip(batch.targets.tolist(), batch.position_ids.tolist(), strict=True):
        previous = position = -1
        for column, label in enumerate(labels):
            padding_begins = label == IGNORE_INDEX != previous
            goes_on = label == IGNORE_INDEX or (label not in starts and label == (previous + 1) % len(stream))
            position = position + 1 if column and goes_on and not padding_begins else 0
            assert positions[column] == position
            previous = label


def test_a_masked_row_gives_the_loss_of_its_documents_apart():
    from tests.tiny import tiny_model

    lengths = [5, 3, 9, 4, 2, 6]
    stream = stream_of(lengths)
    model = tiny_model().train()
    data = training_data({"text": stream}, 16, "best_fit", True)
    rows = data.order.packings["text"].rows_per_epoch
    [batch] = data.read_step(data.order.at_step(DataPosition(), 0, 1), rows, 1).batches
    packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, shift_labels=batch.targets).loss
    apart = 0.0
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        tokens = torch.from_numpy(stream.read(int(start) - 1, length + 1))[None]  # its end-of-text token before it
        apart += model(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss * length
    torch.testing.assert_close(packed, apart / sum(lengths))


@pytest.mark.parametrize("context", [7, 16])
@pytest.mark.parametrize("document_mask", [False, True])
def test_evaluation_scores_every_token_once_and_in_order(context, document_mask):
    batches = list(evaluation_batches(stream_of([30, 1, 69]), context, 3, document_mask))
    assert [token for batch in batches for token in targets(batch)] == list(range(100))
    assert all((batch.position_ids is not None) == document_mask for batch in batches)


def test_epochs_differ_in_order_and_cut():
    packing = pack(stream_of([1000]), "concat", 10, False, 0)
    first, second = ([packing.row(index) for index in range(e * 100, e * 100 + 100)] for e in (0, 1))
    assert first != second
    assert {row[0][0] % 10 for row in first} != {row[0][0] % 10 for row in second}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_order_is_a_function_of_seed_source_and_index_alone(packing):
    def rows(*key, indices=range(400)):
        made = pack(stream_of([9, 4, 7] * 30), packing, 8, False, *key)
        return {index: made.row(index) for index in indices}

    assert rows(3, "tales") == rows(3, "tales", indices=reversed(range(400)))
    assert rows(3, "tales") != rows(4, "tales")
    assert rows(3, "tales") != rows(3, "stories")


def test_a_token_outside_the_vocabulary_is_refused_with_its_source():
    stream = stream_of([50])
    data = training_data({"tales": stream}, 10, vocab_size=50)
    data.read_step(data.order.at_step(DataPosition(), 0, 1), 5, 1)
    data = training_data({"tales": stream}, 10, vocab_size=49)
    with pytest.raises(
        UserError, match="the shards of tales hold the token id 49, but the model's vocabulary ends at 48"
    ):
        data.read_step(data.order.at_step(DataPosition(), 0, 1), 5, 1)


def test_a_batch_moves_as_one():
    batch = read_rows([(stream_of([5, 5]), [(0, 5), (5, 5)])], 12, True)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.position_ids, batch.position_ids)
    assert moved.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    assert read_rows([(stream_of([5]), [(0, 5)])], 5, False).to(torch.device("cpu")).position_ids is None
