"""Batches, and the full path from shards to batches: which tokens are targets, against a count of every token."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.config import PhaseSettings
from scratch_gpt.data.batches import IGNORE_INDEX, evaluation_batches, read_sequences
from scratch_gpt.data.loader import TrainingData
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.packing import pack
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.errors import UserError


def stream_of(lengths, shards=1, first_token=0):
    """A circular stream of documents of these lengths, whose tokens are their positions, from ``first_token``."""
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
    """Return (targets of each sequence of a run, final position); ``steps`` is (sequences in the step, ...)."""
    cursor, sequences = cursor or DataPosition(), []
    for step, size in enumerate(steps):
        cursor = data.order.at_step(cursor, step, len(steps))
        ranks = [data.read_step(cursor, size, micro_batches, rank, world) for rank in range(world)]
        labels = [torch.cat([batch.targets for batch in rank.batches]) for rank in ranks]
        step_targets = torch.stack(labels, dim=1).flatten(0, 1)  # rank r reads sequences r, r + world, ...
        assert {rank.num_targets for rank in ranks} == {int((step_targets != IGNORE_INDEX).sum())}
        assert len({rank.cursor.row for rank in ranks}) == 1
        sequences += [[token for token in sequence if token != IGNORE_INDEX] for sequence in step_targets.tolist()]
        cursor = ranks[0].cursor
    return sequences, cursor


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
    """For any world size, any batch size that changes at any resume point, and in any epoch."""
    stream = stream_of(lengths, shards)
    data = training_data({"text": stream}, context, *packing, seed=seed)
    num_sequences = data.order.packings["text"].sequences_per_epoch
    start = data.order.at_step(DataPosition(), 0, 1)
    start = DataPosition(epoch * num_sequences, start.phase, 0, start.taken)

    reference, end = read_run(data, [1] * num_sequences, cursor=start)  # one rank, one sequence per step
    assert Counter(token for sequence in reference for token in sequence) == Counter(range(len(stream)))
    assert end.row == (epoch + 1) * num_sequences
    assert data.order.epochs(end) == {"text": epoch + 1}

    size = world * micro_batches
    before = min(stop, num_sequences) // size
    resumed, cursor = read_run(data, [size] * before, world, micro_batches, start)
    fresh = training_data({"text": stream}, context, *packing, seed=seed)  # a new process with another batch size
    rest, cursor = read_run(fresh, [1] * (num_sequences - before * size), cursor=cursor)
    assert resumed + rest == reference
    assert cursor == end


@settings(max_examples=100, deadline=None)
@given(lengths=documents, context=st.integers(1, 40), packing=packings)
def test_inputs_precede_their_targets_and_positions_restart_at_each_document(lengths, context, packing):
    """The input of a target is the token before it; for a document's first target, another document's end-of-text."""
    stream, starts = stream_of(lengths), set(np.cumsum([0, *lengths]).tolist())
    data = training_data({"text": stream}, context, *packing)
    cursor = data.order.at_step(DataPosition(), 0, 1)
    num_sequences = data.order.packings["text"].sequences_per_epoch
    assert all(count > 0 for index in range(num_sequences) for _, count in data.order.packings["text"].sequence(index))
    [batch] = data.read_step(cursor, num_sequences, 1).batches
    real = batch.targets != IGNORE_INDEX
    assert torch.equal(((batch.input_ids + 1) % len(stream))[real], batch.targets[real])
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    if not packing[1]:
        assert batch.position_ids is None
        return
    for labels, positions in zip(batch.targets.tolist(), batch.position_ids.tolist(), strict=True):
        previous = position = -1
        for index, label in enumerate(labels):
            padding_begins = label == IGNORE_INDEX != previous
            continues = label == IGNORE_INDEX or (label not in starts and label == (previous + 1) % len(stream))
            position = position + 1 if index and continues and not padding_begins else 0
            assert positions[index] == position
            previous = label


def test_packing_with_a_document_mask_gives_the_loss_of_separate_documents():
    from tests.tiny import tiny_model

    lengths = [5, 3, 9, 4, 2, 6]
    stream = stream_of(lengths)
    model = tiny_model().train()
    data = training_data({"text": stream}, 16, "best_fit", True)
    num_sequences = data.order.packings["text"].sequences_per_epoch
    [batch] = data.read_step(data.order.at_step(DataPosition(), 0, 1), num_sequences, 1).batches
    packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, shift_labels=batch.targets).loss
    separate = 0.0
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        tokens = torch.from_numpy(stream.read(int(start) - 1, length + 1))[None]  # preceded by end-of-text
        separate += model(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss * length
    torch.testing.assert_close(packed, separate / sum(lengths))


@pytest.mark.parametrize("context", [7, 16])
@pytest.mark.parametrize("document_mask", [False, True])
def test_evaluation_scores_every_token_once_in_order(context, document_mask):
    batches = list(evaluation_batches(stream_of([30, 1, 69]), context, 3, document_mask))
    assert [token for batch in batches for token in targets(batch)] == list(range(100))
    assert all((batch.position_ids is not None) == document_mask for batch in batches)


def test_epochs_differ_in_order_and_window_offset():
    packing = pack(stream_of([1000]), "concat", 10, False, 0)
    first, second = ([packing.sequence(index) for index in range(e * 100, e * 100 + 100)] for e in (0, 1))
    assert first != second
    assert {sequence[0][0] % 10 for sequence in first} != {sequence[0][0] % 10 for sequence in second}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_sequence_depends_on_seed_source_and_index_alone(packing):
    def sequences(*key, indices=range(400)):
        packed = pack(stream_of([9, 4, 7] * 30), packing, 8, False, *key)
        return {index: packed.sequence(index) for index in indices}

    assert sequences(3, "tales") == sequences(3, "tales", indices=reversed(range(400)))
    assert sequences(3, "tales") != sequences(4, "tales")
    assert sequences(3, "tales") != sequences(3, "stories")


def test_a_token_id_outside_the_vocabulary_is_refused_naming_its_source():
    stream = stream_of([50])
    data = training_data({"tales": stream}, 10, vocab_size=50)
    data.read_step(data.order.at_step(DataPosition(), 0, 1), 5, 1)
    data = training_data({"tales": stream}, 10, vocab_size=49)
    with pytest.raises(
        UserError, match="the shards of tales hold the token id 49, but the model's vocabulary ends at 48"
    ):
        data.read_step(data.order.at_step(DataPosition(), 0, 1), 5, 1)


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    batch = read_sequences([(stream_of([5, 5]), [(0, 5), (5, 5)])], 12, True)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.position_ids, batch.position_ids)
    assert moved.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    assert read_sequences([(stream_of([5]), [(0, 5)])], 5, False).to(torch.device("cpu")).position_ids is None
