"""Rows that pad the vocabulary make matrices round, and nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from scratch_gpt.model import ScratchGPTConfig

VOCABULARY, PADDED = 97, 128


@pytest.fixture
def pair(build, style):
    """The same model without padding and with it; the rows of padding hold large numbers."""
    plain, padded = build(style), build(style, pad_vocab_size_multiple=64)
    state = plain.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((PADDED - VOCABULARY, state[name].shape[1]), 9.0)])
    padded.load_state_dict(state)
    return plain, padded


def test_no_logit_shows_them(pair, ids):
    plain, padded = pair
    assert padded.transformer.wte.weight.shape[0] == padded.lm_head.weight.shape[0] == PADDED
    assert padded(ids).logits.shape[-1] == VOCABULARY
    torch.testing.assert_close(padded(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_loss_and_gradients_are_the_same(pair, ids, skip_logits):
    plain, padded = pair
    losses = [model(ids, labels=ids, skip_logits=skip_logits).loss for model in pair]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in padded.named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(parameter.grad[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert not parameter.grad[len(expected) :].any(), name


def test_their_ids_are_refused_and_generation_never_writes_them(pair, ids):
    _, padded = pair
    with pytest.raises(ValueError, match="to 97, but vocab_size=97"):
        padded(torch.full_like(ids, VOCABULARY))
    assert padded.generate(ids, do_sample=True, max_new_tokens=8, pad_token_id=0).max() < VOCABULARY


@pytest.mark.parametrize(("tokens", "rows"), [(100, 128), (130, 192), (60, 64), (128, 128)])
def test_resizing_keeps_the_padding(pair, ids, tokens, rows, tmp_path):
    _, padded = pair
    before = padded(ids.clamp(max=59)).logits
    padded.resize_token_embeddings(tokens, mean_resizing=False)
    assert (padded.config.vocab_size, padded.config.padded_vocab_size) == (tokens, rows)
    assert padded.transformer.wte.weight.shape[0] == padded.lm_head.weight.shape[0] == rows
    after = padded(ids.clamp(max=59)).logits
    assert after.shape[-1] == tokens
    kept = min(tokens, VOCABULARY)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    padded.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids.clamp(max=59)).logits, after)


def test_the_config_counts_them():
    assert ScratchGPTConfig(vocab_size=50257, pad_vocab_size_multiple=64).padded_vocab_size == 50304
    assert ScratchGPTConfig(vocab_size=50257).padded_vocab_size == 50257
    with pytest.raises(ValueError, match="pad_vocab_size_multiple=0 must be at least 1"):
        ScratchGPTConfig(pad_vocab_size_multiple=0)
