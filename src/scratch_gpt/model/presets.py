"""Named sizes, and any size between them by its depth.

    from scratch_gpt.model.presets import from_depth, preset

    config = preset("gpt2")                                    # OpenAI's GPT-2, 124 M parameters
    config = preset("modern-135m", vocab_size=8192)            # any field may be overridden
    config = from_depth(6, vocab_size=8192)                    # 6 layers, with width and heads derived

Exact number of parameters, with embeddings, a tied matrix counted once:

| preset      |    parameters | layers | width | heads (kv) | MLP   | vocabulary | shape of                     |
|-------------|--------------:|-------:|------:|-----------:|------:|-----------:|------------------------------|
| gpt2        |   124,439,808 |     12 |   768 |    12 (12) |  3072 |      50257 | GPT-2 small                  |
| gpt2-medium |   354,823,168 |     24 |  1024 |    16 (16) |  4096 |      50257 | GPT-2 medium                 |
| gpt2-large  |   774,030,080 |     36 |  1280 |    20 (20) |  5120 |      50257 | GPT-2 large                  |
| gpt2-xl     | 1,557,611,200 |     48 |  1600 |    25 (25) |  6400 |      50257 | GPT-2 XL                     |
| modern-2m   |     2,607,808 |      5 |   192 |     3 (3)  |   512 |       2048 | ours, for CPU demonstrations |
| modern-30m  |    31,468,416 |     12 |   384 |     6 (2)  |  1024 |      32768 | ours                         |
| modern-135m |   134,518,848 |     30 |   576 |     9 (3)  |  1536 |      49152 | SmolLM2-135M with QK-norm    |
| modern-360m |   361,825,216 |     32 |   960 |    15 (5)  |  2560 |      49152 | SmolLM2-360M with QK-norm    |
| modern-1b   | 1,235,816,448 |     16 |  2048 |    32 (8)  |  8192 |     128256 | Llama-3.2-1B with QK-norm    |
| modern-3b   | 3,212,756,992 |     28 |  3072 |    24 (8)  |  8192 |     128256 | Llama-3.2-3B with QK-norm    |
| modern-7b   | 7,248,031,744 |     32 |  4096 |    32 (8)  | 14336 |      32768 | Mistral-7B-v0.3 with QK-norm |
"""

import difflib
from typing import Any

import torch

from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig
from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTForCausalLM

# The fields of GPT-2's architecture. Dropout, 0.1 in OpenAI's config, is 0: a single epoch needs none.
GPT2_STYLE: dict[str, Any] = {
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
    "position_embedding_type": "learned",
    "norm_type": "layernorm",
    "mlp_type": "plain",
    "attention_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def _shape(layers: int, width: int, heads: int, kv_heads: int, mlp: int, **fields: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        **fields,
    }


_LONG = {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _shape(12, 768, 12, 12, 3072, **GPT2_STYLE),
    "gpt2-medium": _shape(24, 1024, 16, 16, 4096, **GPT2_STYLE),
    "gpt2-large": _shape(36, 1280, 20, 20, 5120, **GPT2_STYLE),
    "gpt2-xl": _shape(48, 1600, 25, 25, 6400, **GPT2_STYLE),
    # A model this narrow learns much faster from larger initial weights: on the bundled corpus 800 steps of `pretrain` reach
    # 1.540 validation bits per byte, and 1.806 with the usual 0.02 (--model.overrides.initializer_range 0.02).
    "modern-2m": _shape(5, 192, 3, 3, 512, vocab_size=2048, max_position_embeddings=256, initializer_range=0.05),
    "modern-30m": _shape(12, 384, 6, 2, 1024, vocab_size=32768),
    "modern-135m": _shape(30, 576, 9, 3, 1536, vocab_size=49152),
    "modern-360m": _shape(32, 960, 15, 5, 2560, vocab_size=49152),
    "modern-1b": _shape(16, 2048, 32, 8, 8192, vocab_size=128256, **_LONG),
    "modern-3b": _shape(28, 3072, 24, 8, 8192, vocab_size=128256, **_LONG),
    "modern-7b": _shape(32, 4096, 32, 8, 14336, vocab_size=32768, tie_word_embeddings=False, **_LONG),
}


def preset(name: str, **overrides: Any) -> ScratchGPTConfig:
    """Build the config of a named size (the table at the top of this file), with any fields overridden.

    Raises:
        ValueError: No preset of this name, or overrides that contradict the rest.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no preset {name!r}: did you mean {nearest!r}? The choices are {', '.join(PRESETS)}")
    return ScratchGPTConfig(**{**PRESETS[name], **overrides})


def from_depth(depth: int, head_dim: int = 64, **overrides: Any) -> ScratchGPTConfig:
    """Build a modern config from its number of layers alone: 64 units of width per layer, heads of `head_dim`.

    A constant ratio of width to depth is near the optimum over a wide range (Kaplan et al. 2020, fig. 5), so one number
    is enough to scale a model up or down. The MLP is `8/3` of the width, rounded up to a multiple of 64.
    With the default vocabulary of 50,257 words the counts are

    | depth | width | heads |    parameters |
    |------:|------:|------:|--------------:|
    |     4 |   256 |     4 |    16,079,872 |
    |     8 |   512 |     8 |    51,431,424 |
    |    12 |   768 |    12 |   123,552,768 |
    |    20 |  1280 |    20 |   460,876,800 |

    Args:
        depth: Number of layers, at least 1.
        head_dim: Width of a head; it must divide `64 * depth`.
        overrides: Any field of `ScratchGPTConfig`; the width derived from the depth can be overridden as well.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    hidden_size = overrides.pop("hidden_size", 64 * depth)
    if hidden_size % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the width {hidden_size} of depth {depth}")
    fields = {"num_hidden_layers": depth, "hidden_size": hidden_size, "num_attention_heads": hidden_size // head_dim}
    return ScratchGPTConfig(**{**fields, "head_dim": head_dim, **overrides})


def count_parameters(config: ScratchGPTConfig) -> int:
    """Count the parameters of the language model, a tied matrix once. Needs no memory for weights."""
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
