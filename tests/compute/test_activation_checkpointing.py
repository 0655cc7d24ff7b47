"""Activation checkpointing saves memory and changes nothing else, dropout included."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from scratch_gpt.compute.activation_checkpointing import _policy, enable_activation_checkpointing
from scratch_gpt.config import TrainingSettings
from tests.tiny import tiny_model

STYLES = {
    "modern": {},
    "gpt2": {"position_embedding_type": "learned", "norm_type": "layernorm", "mlp_type": "plain", "qk_norm": False},
}


def step(style, compiled=False, **settings):
    """(bytes kept for the backward pass, gradients) of a training step with dropout."""
    model = tiny_model(
        num_hidden_layers=4, attention_dropout=0.1, hidden_dropout=0.1, embedding_dropout=0.1, **STYLES[style]
    ).train()
    enable_activation_checkpointing(model, TrainingSettings(**settings))
    if compiled:
        for block in model.transformer.h:
            block.compile()
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(3))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return sum(kept.values()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "full", "activation_checkpointing_every": 2},
        {"activation_checkpointing": "selective"},
    ],
    ids=["full", "every second block", "selective"],
)
def test_the_gradients_are_the_same_with_dropout(style, settings):
    _, expected = step(style)
    _, gradients = step(style, **settings)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("style", STYLES)
def test_less_is_kept(style):
    nothing, _ = step(style)
    half, _ = step(style, activation_checkpointing="full", activation_checkpointing_every=2)
    full, _ = step(style, activation_checkpointing="full")
    assert full < 0.5 * nothing and full < half < nothing


@pytest.mark.parametrize("rows, columns, kept", [(16, 64, False), (64, 16, True), (16, 16, True)])
def test_selective_recomputes_what_is_larger_than_what_it_was_made_of(rows, columns, kept):
    """Scores of 64 keys from heads of 16; the output from them."""
    policy = _policy(None, torch.ops.aten.bmm.default, torch.ones(2, 64, rows), torch.ones(2, rows, columns))
    assert (policy == CheckpointPolicy.MUST_SAVE) == kept


@pytest.mark.slow
def test_compiled_blocks_are_recomputed_as_well():
    nothing, expected = step("modern", compiled=True)
    full, gradients = step("modern", compiled=True, activation_checkpointing="full")
    assert full < nothing
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
