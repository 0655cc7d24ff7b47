import re

import pytest

from scratch_gpt.model import presets
from scratch_gpt.model.presets import PRESETS, count_parameters, from_depth, preset


def documented(table: str, key: str) -> int:
    row = next(line for line in table.splitlines() if re.match(rf"\s*\| *{re.escape(key)} *\|", line))
    return max(int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", row))


@pytest.mark.parametrize("name", PRESETS)
def test_documented_parameter_counts_are_exact(name):
    assert count_parameters(preset(name)) == documented(presets.__doc__, name)


@pytest.mark.parametrize("name", PRESETS)
def test_documented_shapes_are_those_of_the_preset(name):
    config = preset(name)
    shape = [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads]
    row = next(line for line in presets.__doc__.splitlines() if line.startswith(f"| {name} "))
    columns = [int(number) for number in re.findall(r"\d+", "|".join(row.split("|")[3:8]))]
    assert columns == [*shape, config.intermediate_size, config.vocab_size]


@pytest.mark.parametrize("depth", [4, 8, 12, 20])
def test_documented_counts_of_the_depth_dial_are_exact(depth):
    assert count_parameters(from_depth(depth)) == documented(from_depth.__doc__, str(depth))


def test_gpt2_presets_have_the_size_of_transformers_gpt2():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        stock = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    assert count_parameters(preset("gpt2-xl")) == sum(p.numel() for p in stock.parameters())


def test_overrides_win():
    config = preset("modern-135m", vocab_size=1000, num_hidden_layers=2)
    assert (config.vocab_size, config.num_hidden_layers, len(config.layer_types)) == (1000, 2, 2)
    assert from_depth(2, hidden_size=256, head_dim=32).num_attention_heads == 8


def test_unknown_presets_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'modern-135m'"):
        preset("modern-153m")
    with pytest.raises(ValueError, match="depth=0"):
        from_depth(0)
