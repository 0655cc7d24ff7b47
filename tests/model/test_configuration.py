import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from scratch_gpt.model import ScratchGPTConfig

LEARNED = {"position_embedding_type": "learned"}


def test_defaults_are_the_modern_style():
    config = ScratchGPTConfig()
    assert (config.position_embedding_type, config.norm_type, config.mlp_type) == ("rope", "rmsnorm", "gated")
    assert (config.qk_norm, config.attention_bias, config.mlp_bias, config.norm_bias) == (True, False, False, False)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (64, 12, 2048)
    assert config.hidden_act == "silu" and config.rope_parameters["rope_theta"] == 10_000.0


def test_derived_fields_follow_the_style():
    plain = ScratchGPTConfig(mlp_type="plain", norm_type="layernorm", attention_bias=True)
    assert (plain.intermediate_size, plain.hidden_act) == (4 * 768, "gelu_new")
    assert plain.norm_bias is True and plain.attention_out_bias is True


def test_gpt2_names_are_accepted_and_derived_fields_follow_them():
    config = ScratchGPTConfig(n_embd=64, n_head=4, n_layer=2, n_positions=32, n_inner=96, resid_pdrop=0.1, **LEARNED)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (64, 16, 4)
    assert (config.intermediate_size, config.max_position_embeddings, config.hidden_dropout) == (96, 32, 0.1)
    assert len(config.layer_types) == 2 and config.n_embd == 64


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, ["hidden_size=100", "num_attention_heads=12", "head_dim"]),
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, ["num_attention_heads=12", "num_key_value_heads=5"]),
        ({"head_dim": 33}, ["head_dim=33", "odd"]),
        ({"rope_parameters": {"rope_type": "default"}, **LEARNED}, ["rope_parameters", "'learned'"]),
        ({"rope_theta": 5e5, "position_embedding_type": "none"}, ["rope_theta", "'none'"]),
        ({"no_rope_layer_interval": 4, **LEARNED}, ["no_rope_layer_interval", "'learned'"]),
        ({"no_rope_layers": [1, 0]}, ["no_rope_layers has 2", "num_hidden_layers=12"]),
        ({"no_rope_layers": [1] * 12, "no_rope_layer_interval": 4}, ["disagree"]),
        ({"sliding_window": 128}, ["sliding_window=128", "layer_types"]),
        ({"layer_types": ["sliding_attention"] * 12}, ["sliding_window is None"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types has 3", "num_hidden_layers=12"]),
        ({"layer_types": ["linear_attention"] * 12}, ["linear_attention", "full_attention"]),
        ({"norm_bias": True}, ["norm_bias", "layernorm"]),
        ({"hidden_act": "sillu"}, ["hidden_act='sillu'", "silu"]),
        ({"rope_parameters": {"rope_type": "yarrn", "factor": 2.0}}, ["yarrn", "yarn"]),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=0.5", "proportional"],
        ),
        ({"final_logit_softcapping": 0.0}, ["final_logit_softcapping=0.0"]),
        ({"attention_dropout": 1.5}, ["attention_dropout=1.5"]),
        ({"num_atention_heads": 8}, ["num_atention_heads", "'num_attention_heads'"]),
        ({"num_layers": 8}, ["num_layers", "num_hidden_layers"]),
        ({"dropout": 0.1}, ["'dropout'", "attention_dropout"]),
    ],
)
def test_contradictions_are_refused_with_field_value_and_fix(fields, words):
    with pytest.raises(ValueError) as error:
        ScratchGPTConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError) as error:
        ScratchGPTConfig(num_key_value_heads=5, sliding_window=4, norm_bias=True, vocab_sise=3)
    for word in ("num_key_value_heads", "sliding_window", "norm_bias", "vocab_sise"):
        assert word in str(error.value)


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="hidden_size"):
        ScratchGPTConfig(hidden_size="768")


def test_a_config_spoilt_after_building_is_refused_at_save(tmp_path):
    config = ScratchGPTConfig()
    config.num_key_value_heads = 5
    with pytest.raises(Exception, match="num_key_value_heads=5"):
        config.save_pretrained(tmp_path)


def test_no_model_is_built_from_a_config_spoilt_after_building():
    config = ScratchGPTConfig(hidden_size=32, num_attention_heads=4)
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads=4 is not divisible by num_key_value_heads=3"):
        AutoModelForCausalLM.from_config(config)


def test_save_and_load_give_an_equal_config(tmp_path, build, style):
    config = build(style).config
    config.save_pretrained(tmp_path)
    loaded = ScratchGPTConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "dtype"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }


def test_attributes_added_to_a_config_are_loaded_again_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger(ScratchGPTConfig.__module__), "propagate", True)
    config = ScratchGPTConfig()
    config.layer_norm_eps, config.sliding_window = 1.0, 128  # neither means anything to this model
    config.save_pretrained(tmp_path)
    loaded = ScratchGPTConfig.from_pretrained(tmp_path)
    assert loaded.layer_norm_eps == 1.0 and loaded.sliding_window == 128
    assert "'layer_norm_eps': did you mean 'layer_norm_epsilon'" in caplog.text
    assert "sliding_window=128 is ignored" in caplog.text


def test_building_a_config_leaves_the_callers_dictionary_alone():
    rope_parameters = {"rope_type": "linear", "factor": 2.0}
    ScratchGPTConfig(rope_parameters=rope_parameters)
    assert rope_parameters == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_only_a_config_with_rotary_positions_has_rope_parameters(tmp_path, positions):
    # transformers asks hasattr() before it scales rotary positions; None would be taken for an empty dictionary
    config = ScratchGPTConfig(position_embedding_type=positions)
    assert hasattr(config, "rope_parameters") == (positions == "rope")
    config.save_pretrained(tmp_path)
    loaded = ScratchGPTConfig.from_pretrained(tmp_path)
    assert hasattr(loaded, "rope_parameters") == (positions == "rope")
    assert loaded == config and repr(loaded) == repr(config)
    assert loaded != ScratchGPTConfig(position_embedding_type=positions, hidden_size=96)


def test_a_config_of_another_model_type_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='gpt2'.*scratch_gpt"):
        ScratchGPTConfig.from_pretrained(tmp_path)


def test_parallel_plans_name_only_modules_that_exist(build, style):
    model = build(style)
    names = {name for name, _ in model.named_modules()}
    plans = {**model.tp_plan, **model.fsdp_plan}
    for rule in plans:
        assert rule.replace("*", "0") in names, rule
    weights = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.ndim == 2}
    covered = {rule.replace("*", "0") for rule in model.tp_plan}
    assert {name for name in weights if ".h." not in name or ".h.0." in name} - covered <= {"transformer.wpe"}
    assert bool(model.config.base_model_pp_plan) == (style != "gpt2")


def test_state_dict_has_the_documented_names(build):
    names = set(build("modern").state_dict())
    assert {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"} <= names
    block = ["ln_1", "ln_2", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "attn.q_norm", "attn.k_norm"]
    block += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert {f"transformer.h.2.{name}.weight" for name in block} <= names
    assert "transformer.wpe.weight" in build("gpt2").state_dict()
    assert build("modern").dtype == torch.float32
