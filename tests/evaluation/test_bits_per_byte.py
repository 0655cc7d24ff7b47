"""Bits per byte against its definition."""

import math

import numpy as np
import pytest
import torch

from scratch_gpt.evaluation.bits_per_byte import score_stream, to_text_score
from tests.tiny import random_stream, tiny_model


def test_bits_per_byte_is_the_definition():
    model, stream = tiny_model().eval(), random_stream(100)
    result = to_text_score(*score_stream(model, stream, 16, 50).tolist(), stream.num_bytes)
    nats = 0.0
    for first in range(0, 100, 16):  # token by token, each predicted from the tokens before it in its sequence
        sequence = stream.read(first - 1, min(16, 100 - first) + 1)
        for position in range(1, len(sequence)):
            with torch.no_grad():
                logits = model(torch.from_numpy(sequence[None, :position])).logits[0, -1].double().numpy()
            nats -= logits[sequence[position]] - np.log(np.exp(logits).sum())
    assert result.loss == pytest.approx(nats / 100, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 300, rel=1e-5)


def test_the_batches_of_all_ranks_add_up_to_the_full_text():
    model, stream = tiny_model().eval(), random_stream(2000)
    full = score_stream(model, stream, 16, 50)
    sharded = sum(score_stream(model, stream, 16, 50, rank=rank, world_size=3) for rank in range(3))
    torch.testing.assert_close(sharded, full)
    assert full[1] == 2000
