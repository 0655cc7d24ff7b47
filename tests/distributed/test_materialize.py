"""Initialization of weights, parameter by parameter."""

import pytest
import torch

from scratch_gpt import ScratchGPTForCausalLM
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.model.presets import preset

SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.mark.parametrize("name", ["gpt2", "modern-2m"])
def test_each_weight_is_initialized_as_the_model_defines_from_its_own_name(name):
    config = preset(name, **SMALL, num_hidden_layers=2)
    torch.manual_seed(0)
    stock, ours, again = ScratchGPTForCausalLM(config), build_model(config, 1), build_model(config, 1)
    other = build_model(preset(name, **SMALL, num_hidden_layers=3), 1)
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    for key, weight in stock.named_parameters():
        initialized = ours.get_parameter(key)
        assert initialized.std().item() == pytest.approx(weight.std().item(), rel=0.1, abs=1e-6), key
        assert initialized.mean().item() == pytest.approx(weight.mean().item(), abs=0.01), key
        assert torch.equal(initialized, again.get_parameter(key)), key
    for key, buffer in stock.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(key)), key
    assert ours.lm_head.weight is ours.transformer.wte.weight
    first, second = (ours.transformer.h[layer].mlp.up_proj.weight for layer in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, other.transformer.h[0].mlp.up_proj.weight)  # whatever else there is
