"""Stock models convert to ScratchGPT models and back with the same logits and weights."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
)

from scratch_gpt.convert.families import from_hf, to_hf
from scratch_gpt.convert.family_tables import FAMILIES
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForSequenceClassification
from tests.model.test_against_stock_models import HEAD_DIM, ROPE_TYPES, STOCK_SIZE, VOCABULARY, randomized

GPT2_SIZE = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 80}
LLAMA_BIASES = {"attention_bias": True, "mlp_bias": True}
NO_ROPE = {"no_rope_layers": [1, 0, 1]}
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied, four times the width": ("gpt2", {"tie_word_embeddings": False, "n_inner": None}),
    "gpt2 of one layer with one head": ("gpt2", {"n_layer": 1, "n_head": 1, "n_inner": 7}),
    "gpt2 with another activation": ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    **{f"llama {rope}": ("llama", {"rope_parameters": ROPE_TYPES[rope], "head_dim": HEAD_DIM}) for rope in ROPE_TYPES},
    "llama with biases and wide heads": ("llama", {**LLAMA_BIASES, "head_dim": 20}),
    "llama of one layer with one key/value head": ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 1}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 of an odd width": ("qwen3", {"hidden_size": 35, "head_dim": 6, "intermediate_size": 33}),
    "qwen3 with biases and yarn": ("qwen3", {"attention_bias": True, "rope_parameters": ROPE_TYPES["yarn"]}),
    "smollm3": ("smollm3", NO_ROPE),
    "smollm3 with biases": ("smollm3", {**LLAMA_BIASES, "no_rope_layers": [1, 1, 1]}),
    "smollm3 with windows": ("smollm3", {**NO_ROPE, "use_sliding_window": True, "sliding_window": 9}),
}


def stock_model(case: str, **fields):
    model_type, own = CASES[case]
    size = GPT2_SIZE if model_type == "gpt2" else STOCK_SIZE
    config = AutoConfig.for_model(model_type, **{**size, "initializer_range": 0.2, **own, **fields})
    return randomized(AutoModelForCausalLM.from_config(config))


def logits(model):
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_logits_and_weights(case, tmp_path):
    stock = stock_model(case)
    stock.generation_config.max_new_tokens = 7
    ours = from_hf(stock)
    assert type(ours) is ScratchGPTForCausalLM and ours.generation_config.max_new_tokens == 7
    assert logits(stock).std() > 0.5
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)

    again = to_hf(ours, stock.config.model_type)
    assert type(again) is type(stock)
    assert again.state_dict().keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(logits(again), logits(stock))

    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = from_hf(tmp_path)
    assert loaded.config.to_dict() == {**ours.config.to_dict(), "_name_or_path": loaded.config._name_or_path}
    assert torch.equal(logits(loaded), logits(ours)) and loaded.generation_config.max_new_tokens == 7


@pytest.mark.parametrize(
    ("style", "fields", "expected"),
    [
        ("gpt2", {}, "gpt2"),
        ("modern", {"qk_norm": False}, "llama"),
        ("modern", {}, "qwen3"),
        ("modern", {"qk_norm": False, "attention_bias": True, "attention_out_bias": False}, "qwen2"),
        ("modern", {"qk_norm": False, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3}, "mistral"),
        ("modern", {"qk_norm": False, "no_rope_layers": [1, 1, 0], "hidden_act": "relu2"}, "smollm3"),
        ("modern", {"qk_norm": False, "head_dim": 10, "num_attention_heads": 5, "num_key_value_heads": 1}, "mistral"),
    ],
)
def test_auto_chooses_a_class_that_can_express_the_model(build, style, fields, expected, ids):
    model = build(style, **fields)
    if expected == "mistral" and "sliding_window" not in fields:
        # Qwen2 requires biases, and Llama a hidden_size that is a multiple of its heads
        assert model.config.hidden_size % model.config.num_attention_heads
    stock = to_hf(model)
    assert stock.config.model_type == expected
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not stock.training


@pytest.mark.parametrize(
    ("style", "fields", "to", "named"),
    [
        ("modern", {}, "llama", "qk_norm=True"),
        ("modern", {"final_logit_softcapping": 5.0}, "qwen3", "final_logit_softcapping=5.0"),
        ("modern", {"attention_bias": True, "attention_out_bias": False}, "qwen3", "attention_out_bias=False"),
        ("modern", {"no_rope_layer_interval": 2}, "qwen3", "no_rope_layers="),
        ("modern", {"qk_norm": False, "mlp_type": "plain"}, "llama", "mlp_type='plain'"),
        ("modern", {"qk_norm": False, "position_embedding_type": "none"}, "llama", "position_embedding_type='none'"),
        ("gpt2", {"mlp_bias": False}, "gpt2", "mlp_bias=False"),
        ("gpt2", {"num_key_value_heads": 2}, "gpt2", "num_key_value_heads=2"),
        ("gpt2", {"head_dim": 4}, "gpt2", "head_dim=4"),
        ("gpt2", {"norm_bias": False}, "auto", "norm_bias=False"),
        ("mixture", {}, "auto", "norm_type='layernorm'"),
    ],
)
def test_fields_that_a_class_cannot_express_are_named(build, style, fields, to, named):
    with pytest.raises(ValueError, match="cannot express|no stock class") as refusal:
        to_hf(build(style, **fields), to)
    assert named in str(refusal.value)
    if to == "auto":
        assert all(family.class_names["CausalLM"] in str(refusal.value) for family in FAMILIES.values())


def test_vocabulary_padding_is_removed(build, ids):
    model = build("modern", pad_vocab_size_multiple=64)
    stock = to_hf(model)
    assert stock.lm_head.weight.shape[0] == model.config.vocab_size == 97
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stock_class", "config"),
    [
        (GPT2ForSequenceClassification, GPT2Config(**GPT2_SIZE, num_labels=3, pad_token_id=0)),
        (LlamaForSequenceClassification, LlamaConfig(**{**STOCK_SIZE, "num_labels": 3, "pad_token_id": 0})),
    ],
)
def test_sequence_classifiers_convert(stock_class, config):
    stock = randomized(stock_class(config))
    ours = from_hf(stock)
    assert type(ours) is ScratchGPTForSequenceClassification and ours.num_labels == 3
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(to_hf(ours)), logits(stock))


def test_the_dtype_is_kept(tmp_path):
    stock = stock_model("llama tied").to(torch.bfloat16)
    ours = from_hf(stock)
    assert ours.dtype == torch.bfloat16 and to_hf(ours).dtype == torch.bfloat16
    stock.save_pretrained(tmp_path)
    assert from_hf(tmp_path).dtype == torch.bfloat16


def test_files_saved_without_head_and_with_old_masks_are_read(tmp_path):
    stock = stock_model("gpt2")
    state = {name.removeprefix("transformer."): tensor for name, tensor in stock.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    stock.config.architectures = ["GPT2LMHeadModel"]
    stock.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(from_hf(tmp_path)), logits(stock), rtol=1e-5, atol=1e-5)


def test_source_model_is_not_modified():
    stock = stock_model("llama tied")
    before = logits(stock)
    ours = from_hf(stock)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(logits(stock), before)


def test_unsupported_models_are_refused_with_the_field(tmp_path):
    with pytest.raises(ValueError, match=r"scale_attn_by_inverse_layer_idx=True"):
        from_hf(stock_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="model_type='mamba'"):
        from_hf(tmp_path / "mamba")
    ScratchGPTConfig().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="already"):
        from_hf(tmp_path / "ours")
    with pytest.raises(ValueError, match="neither a folder here"):
        from_hf("no/such/model/anywhere")


def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path):
    stock = stock_model("llama tied")
    stock.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    renamed = {**weights, "model.layers.0.self_attn.q_prj.weight": weights["model.layers.0.self_attn.q_proj.weight"]}
    del renamed["model.layers.0.self_attn.q_proj.weight"]
    save_file(renamed, file)
    with pytest.raises(ValueError, match=r"missing: model.layers.0.self_attn.q_proj.*unknown: .*q_prj"):
        from_hf(tmp_path)
    save_file({**weights, "model.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight.*\(3,\).*\(48,\)"):
        from_hf(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="only safetensors"):
        from_hf(tmp_path)


def test_unsupported_dropout_is_dropped_with_a_warning(build, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("scratch_gpt.convert.families"), "propagate", True)
    to_hf(build("modern", hidden_dropout=0.1))
    assert "hidden_dropout=0.1 is not exported" in caplog.text
