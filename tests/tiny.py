"""A tiny model and a stream of random tokens."""

import numpy as np
import torch

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.data.shards import TokenStream


def tiny_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ScratchGPTForCausalLM(ScratchGPTConfig(**{**sizes, "max_position_embeddings": 16, **fields}))


def random_stream(num_tokens=200):
    tokens, documents = np.random.default_rng(0).integers(0, 50, num_tokens), np.arange(0, num_tokens, 9)
    return TokenStream([tokens], num_bytes=3 * num_tokens, documents=[documents])
