from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.data.batches import IGNORE_INDEX, RowOrder, evaluation_batches, read_rows
from scratch_gpt.data.shards import TokenStream


def ring(num_tokens):
    """A stream whose tokens are their own positions."""
    return TokenStream([np.arange(num_tokens)], num_bytes=1)


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(2, 300), context=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_token_is_a_target_exactly_once_per_epoch(num_tokens, context, seed, epoch):
    order = RowOrder(num_tokens, context, seed)
    indices = range(epoch * order.rows_per_epoch, (epoch + 1) * order.rows_per_epoch)
    batch = read_rows(ring(num_tokens), [order.locate(index) for index in indices], context)
    targets = batch.labels[batch.labels != IGNORE_INDEX]
    assert Counter(targets.tolist()) == Counter(range(num_tokens))
    assert order.num_targets(indices) == num_tokens
    followed = (batch.input_ids + 1) % num_tokens
    assert torch.equal(followed[batch.labels != IGNORE_INDEX], targets)


@pytest.mark.parametrize("context", [7, 16])
def test_evaluation_scores_every_token_once_and_in_order(context):
    batches = list(evaluation_batches(ring(100), context, batch_size=3))
    targets = torch.cat([batch.labels.flatten() for batch in batches])
    assert targets[targets != IGNORE_INDEX].tolist() == list(range(100))


def test_epochs_differ_in_order_and_cut():
    order = RowOrder(1000, 10, seed=0)
    first, second = ([order.locate(index) for index in range(e * 100, e * 100 + 100)] for e in (0, 1))
    assert first != second
    assert {start % 10 for start, _ in first} != {start % 10 for start, _ in second}


def test_order_is_a_function_of_seed_and_index_alone():
    there, back = RowOrder(500, 8, seed=3), RowOrder(500, 8, seed=3)
    indices = list(range(400))
    forwards = {index: there.locate(index) for index in indices}
    backwards = {index: back.locate(index) for index in reversed(indices)}
    assert forwards == backwards
    assert forwards != {index: RowOrder(500, 8, seed=4).locate(index) for index in indices}
