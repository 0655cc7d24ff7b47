"""Gradient accumulation against a single forward pass."""

import pytest
import torch

from scratch_gpt.data.batches import read_rows
from scratch_gpt.data.packing import pack
from tests.tiny import random_stream, tiny_model


@pytest.mark.parametrize("document_mask", [False, True])
def test_micro_batches_give_the_gradient_of_the_full_batch(document_mask):
    stream = random_stream()
    packing = pack(stream, "concat", 16, document_mask, 0)
    rows = [(stream, packing.row(index)) for index in range(13)]  # 12.5 rows per epoch: one row is short
    gradients = []
    for size in (13, 3):
        model = tiny_model().train()
        for first in range(0, 13, size):
            batch = read_rows(rows[first : first + size], 16, document_mask)
            loss = model(
                input_ids=batch.input_ids,
                shift_labels=batch.targets,
                position_ids=batch.position_ids,
                num_items_in_batch=200,
            ).loss
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
