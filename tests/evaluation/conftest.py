"""Fixtures of the evaluation tests."""

import pytest
import torch

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.data.sources import bundled_corpus, read_documents
from scratch_gpt.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def held_out():
    return list(read_documents([bundled_corpus("valid")]))


@pytest.fixture(scope="module")
def saved_model(tokenizer_folder, tmp_path_factory):
    """Folder of a tiny model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    config = ScratchGPTConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # far from uniform, so that the choices differ
    )
    folder = tmp_path_factory.mktemp("model")
    ScratchGPTForCausalLM(config).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder
