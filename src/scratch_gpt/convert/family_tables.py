"""The conversion tables: one `Family` for each stock architecture, with its config fields, fixed values and weights.

Conversions in both directions read the same table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig


@dataclass(frozen=True)
class Weight:
    """One module's `.weight` and `.bias` in the stock model, and our modules whose tensors it concatenates by rows."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """GPT-2 stores its projections as (in, out)."""


@dataclass(frozen=True)
class Family:
    """Options of one architecture of transformers, in terms of `ScratchGPTConfig`."""

    model_type: str
    class_names: dict[str, str]
    """Kind of head: stock class."""
    fields: dict[str, str]
    """Our config field: the stock field, copied both ways."""
    fixed: dict[str, Any]
    """Our config field: the only value that this architecture supports."""
    weights: tuple[Weight, ...]
    checks: tuple[Callable[[ScratchGPTConfig], str | None], ...] = ()
    """Further checks of our config. Each returns what the architecture does not support, or None."""
    required_stock_values: tuple[tuple[str, Any], ...] = ()
    """Stock fields, each with the only value that our model supports."""
    uses_window: bool = False
    """Whether the stock config has `layer_types` and the switch `use_sliding_window`."""


def _names(*pairs: tuple[str, str]) -> tuple[Weight, ...]:
    return tuple(Weight(theirs, (ours,)) for theirs, ours in pairs)


LLAMA_WEIGHTS = _names(
    ("model.embed_tokens", "transformer.wte"),
    ("model.layers.*.input_layernorm", "transformer.h.*.ln_1"),
    ("model.layers.*.self_attn.q_proj", "transformer.h.*.attn.q_proj"),
    ("model.layers.*.self_attn.k_proj", "transformer.h.*.attn.k_proj"),
    ("model.layers.*.self_attn.v_proj", "transformer.h.*.attn.v_proj"),
    ("model.layers.*.self_attn.o_proj", "transformer.h.*.attn.o_proj"),
    ("model.layers.*.self_attn.q_norm", "transformer.h.*.attn.q_norm"),
    ("model.layers.*.self_attn.k_norm", "transformer.h.*.attn.k_norm"),
    ("model.layers.*.post_attention_layernorm", "transformer.h.*.ln_2"),
    ("model.layers.*.mlp.gate_proj", "transformer.h.*.mlp.gate_proj"),
    ("model.layers.*.mlp.up_proj", "transformer.h.*.mlp.up_proj"),
    ("model.layers.*.mlp.down_proj", "transformer.h.*.mlp.down_proj"),
    ("model.norm", "transformer.ln_f"),
    ("lm_head", "lm_head"),
    ("score", "score"),
)

GPT2_WEIGHTS = (
    *_names(
        ("transformer.wte", "transformer.wte"),
        ("transformer.wpe", "transformer.wpe"),
        ("transformer.h.*.ln_1", "transformer.h.*.ln_1"),
        ("transformer.h.*.ln_2", "transformer.h.*.ln_2"),
        ("transformer.ln_f", "transformer.ln_f"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    Weight("transformer.h.*.attn.c_attn", tuple(f"transformer.h.*.attn.{x}_proj" for x in "qkv"), transposed=True),
    Weight("transformer.h.*.attn.c_proj", ("transformer.h.*.attn.o_proj",), transposed=True),
    Weight("transformer.h.*.mlp.c_fc", ("transformer.h.*.mlp.up_proj",), transposed=True),
    Weight("transformer.h.*.mlp.c_proj", ("transformer.h.*.mlp.down_proj",), transposed=True),
)

_SHARED_FIELDS = {
    name: name
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        *("hidden_act", "attention_dropout", "initializer_range", "tie_word_embeddings", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
}
_LLAMA_FIELDS = {
    **_SHARED_FIELDS,
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "rope_parameters": "rope_parameters",
}
_LLAMA_FIXED = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "norm_bias": False,
    "mlp_type": "gated",
    "qk_norm": False,
    "final_logit_softcapping": None,
}


def _all_layers_rotate(config: ScratchGPTConfig) -> str | None:
    if config.no_rope_layers is not None and 0 in config.no_rope_layers:
        return f"no_rope_layers={config.no_rope_layers}: every layer of this class has rotary positions"
    return None


def _no_window(config: ScratchGPTConfig) -> str | None:
    if "sliding_attention" in config.layer_types:
        return f'layer_types with "sliding_attention" (sliding_window={config.sliding_window}): this class has none'
    return None


def _one_kind_of_layer(config: ScratchGPTConfig) -> str | None:
    if len(set(config.layer_types)) > 1:
        return "layer_types of two kinds: in this class all layers have a sliding window or none has"
    return None


def _one_attention_bias(config: ScratchGPTConfig) -> str | None:
    if config.attention_out_bias != config.attention_bias:
        return (
            f"attention_out_bias={config.attention_out_bias} with attention_bias={config.attention_bias}: "
            "this class has one switch for both"
        )
    return None


def _hidden_size_is_a_multiple_of_heads(config: ScratchGPTConfig) -> str | None:
    if config.hidden_size % config.num_attention_heads:
        return (
            f"hidden_size={config.hidden_size} with num_attention_heads={config.num_attention_heads}: "
            "hidden_size must be a multiple of num_attention_heads"
        )
    return None


def _heads_fill_hidden_size(config: ScratchGPTConfig) -> str | None:
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        return f"head_dim={config.head_dim}: it must be hidden_size / num_attention_heads"
    return None


def _no_grouped_queries(config: ScratchGPTConfig) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return f"num_key_value_heads={config.num_key_value_heads}: it must be num_attention_heads"
    return None


def _classes(prefix: str, language_model: str = "ForCausalLM") -> dict[str, str]:
    return {"CausalLM": prefix + language_model, "SequenceClassification": f"{prefix}ForSequenceClassification"}


# `auto` tries them in this order.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt2",
            class_names=_classes("GPT2", "LMHeadModel"),
            fields={
                **_SHARED_FIELDS,
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
                "hidden_act": "activation_function",
                "attention_dropout": "attn_pdrop",
                "hidden_dropout": "resid_pdrop",
                "embedding_dropout": "embd_pdrop",
                "layer_norm_epsilon": "layer_norm_epsilon",
            },
            fixed={
                "position_embedding_type": "learned",
                "norm_type": "layernorm",
                "norm_bias": True,
                "mlp_type": "plain",
                "mlp_bias": True,
                "attention_bias": True,
                "attention_out_bias": True,
                "qk_norm": False,
                "final_logit_softcapping": None,
            },
            weights=GPT2_WEIGHTS,
            checks=(_heads_fill_hidden_size, _no_grouped_queries, _no_window),
            required_stock_values=(
                ("scale_attn_weights", True),
                ("scale_attn_by_inverse_layer_idx", False),
                ("add_cross_attention", False),
            ),
        ),
        Family(
            model_type="llama",
            class_names=_classes("Llama"),
            fields={
                **_LLAMA_FIELDS,
                "head_dim": "head_dim",
                "attention_bias": "attention_bias",
                "mlp_bias": "mlp_bias",
            },
            fixed=_LLAMA_FIXED,
            weights=LLAMA_WEIGHTS,
            checks=(_hidden_size_is_a_multiple_of_heads, _one_attention_bias, _all_layers_rotate, _no_window),
        ),
        Family(
            model_type="qwen3",
            class_names=_classes("Qwen3"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim", "attention_bias": "attention_bias"},
            fixed={**_LLAMA_FIXED, "qk_norm": True, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            checks=(_one_attention_bias, _all_layers_rotate),
            uses_window=True,
        ),
        Family(
            model_type="qwen2",
            class_names=_classes("Qwen2"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim"},
            fixed={**_LLAMA_FIXED, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            checks=(_all_layers_rotate,),
            uses_window=True,
        ),
        Family(
            model_type="mistral",
            class_names=_classes("Mistral"),
            fields={**_LLAMA_FIELDS, "head_dim": "head_dim"},
            fixed={**_LLAMA_FIXED, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
            weights=LLAMA_WEIGHTS,
            checks=(_all_layers_rotate, _one_kind_of_layer),
        ),
        Family(
            model_type="smollm3",
            class_names=_classes("SmolLM3"),
            fields={
                **_LLAMA_FIELDS,
                "head_dim": "head_dim",
                "attention_bias": "attention_bias",
                "mlp_bias": "mlp_bias",
                "no_rope_layers": "no_rope_layers",
            },
            fixed=_LLAMA_FIXED,
            weights=LLAMA_WEIGHTS,
            checks=(_one_attention_bias,),
            uses_window=True,
        ),
    )
}
