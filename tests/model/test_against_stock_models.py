"""The same weights in transformers' own classes give the same logits."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY, WIDTH, LAYERS, HEADS, HEAD_DIM = 97, 48, 3, 4, 20
STOCK_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OUR_SIZE = STOCK_SIZE
ROPE_TYPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1 + pair / 10 for pair in range(HEAD_DIM // 2)],
        "long_factor": [2 + pair / 3 for pair in range(HEAD_DIM // 2)],
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def test_every_rope_type_is_covered():
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}


def llama_names(name: str) -> str:
    """Our name of a parameter of the Llama family."""
    for theirs, ours in (
        ("model.layers.", "transformer.h."),
        ("model.embed_tokens.", "transformer.wte."),
        ("model.norm.", "transformer.ln_f."),
        ("self_attn.", "attn."),
        ("post_attention_layernorm.", "ln_2."),
        ("input_layernorm.", "ln_1."),
    ):
        name = name.replace(theirs, ours)
    return name


def gpt2_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights under our names: its projections are transposed, and query, key and value are one matrix."""
    ours = {}
    for name, tensor in state.items():
        if ".attn.c_attn." in name:
            parts = tensor.chunk(3, dim=-1)
            for letter, part in zip("qkv", parts, strict=True):
                ours[name.replace("c_attn", f"{letter}_proj")] = part.t() if part.ndim == 2 else part
            continue
        transposed = tensor.ndim == 2 and (".c_proj." in name or ".c_fc." in name)
        name = name.replace("attn.c_proj", "attn.o_proj").replace("mlp.c_proj", "mlp.down_proj")
        ours[name.replace("mlp.c_fc", "mlp.up_proj")] = tensor.t() if transposed else tensor
    return ours


def randomized(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def assert_same_logits(ours, stock, attn):
    ours.set_attn_implementation(attn)
    stock.set_attn_implementation(attn)
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    with torch.no_grad():
        for mask in (None, padded):
            a, b = ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits
            if mask is not None:
                a, b = a[mask.bool()], b[mask.bool()]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # the logits reach 10
    assert b.std() > 0.5  # logits of a dead model would agree, too


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_equal_gpt2(build, attn):
    stock = randomized(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=80)
        )
    )
    ours = build("gpt2", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=80)
    ours.load_state_dict(gpt2_weights(stock.state_dict()))
    # GPT-2 counts positions from the left edge, padding included, unless it gets position_ids.
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ours.set_attn_implementation(attn)
    stock.set_attn_implementation(attn)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = stock(ids, attention_mask=mask, position_ids=position_ids).logits[mask.bool()]
        torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_logits_equal_llama_for_every_rope_type(build, attn, rope_type):
    rope = ROPE_TYPES[rope_type]
    fields = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "head_dim": HEAD_DIM}
    stock = randomized(LlamaForCausalLM(LlamaConfig(**STOCK_SIZE, **fields, rope_parameters=dict(rope))))
    ours = build("modern", **OUR_SIZE, **fields, rope_parameters=rope, qk_norm=False, rms_norm_eps=1e-6)
    ours.load_state_dict({llama_names(name): tensor for name, tensor in stock.state_dict().items()})
    assert_same_logits(ours, stock, attn)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_equal_qwen3_with_head_dim_unlike_hidden_over_heads(build, attn):
    fields = {"head_dim": 32, "tie_word_embeddings": True}
    stock = randomized(Qwen3ForCausalLM(Qwen3Config(**STOCK_SIZE, **fields)))
    ours = build("modern", **OUR_SIZE, **fields, rms_norm_eps=1e-6)
    ours.load_state_dict({llama_names(name): tensor for name, tensor in stock.state_dict().items()})
    assert_same_logits(ours, stock, attn)


def test_logits_equal_qwen2_with_biases_on_query_key_value_only(build):
    stock = randomized(Qwen2ForCausalLM(Qwen2Config(**STOCK_SIZE, tie_word_embeddings=True)))
    fields = {"attention_bias": True, "attention_out_bias": False, "qk_norm": False, "head_dim": None}
    ours = build("modern", **OUR_SIZE, **fields, rms_norm_eps=1e-6)
    ours.load_state_dict({llama_names(name): tensor for name, tensor in stock.state_dict().items()})
    assert_same_logits(ours, stock, "sdpa")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_logits_equal_mistral_with_a_window_shorter_than_the_sequence(build, attn):
    stock = randomized(MistralForCausalLM(MistralConfig(**STOCK_SIZE, sliding_window=9, tie_word_embeddings=True)))
    fields = {"sliding_window": 9, "layer_types": ["sliding_attention"] * LAYERS, "qk_norm": False, "head_dim": None}
    ours = build("modern", **OUR_SIZE, **fields, rms_norm_eps=1e-6)
    ours.load_state_dict({llama_names(name): tensor for name, tensor in stock.state_dict().items()})
    assert_same_logits(ours, stock, attn)


def test_logits_equal_smollm3_with_layers_without_positions(build):
    stock = randomized(SmolLM3ForCausalLM(SmolLM3Config(**STOCK_SIZE, no_rope_layer_interval=2, rope_theta=1e4)))
    fields = {"no_rope_layer_interval": 2, "qk_norm": False, "head_dim": None}
    ours = build("modern", **OUR_SIZE, **fields, rms_norm_eps=1e-6)
    assert ours.config.no_rope_layers == stock.config.no_rope_layers == [1, 0, 1]
    ours.load_state_dict({llama_names(name): tensor for name, tensor in stock.state_dict().items()})
    assert_same_logits(ours, stock, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_equal_llamas(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from scratch_gpt.model.modeling_scratch_gpt import ScratchGPTRMSNorm

    torch.manual_seed(0)
    ours, stock = ScratchGPTRMSNorm(24, eps=1e-3), LlamaRMSNorm(24, eps=1e-3)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24))
        stock.weight.copy_(ours.weight)
    x = torch.randn(2, 5, 24).to(dtype)
    upstream = torch.randn(2, 5, 24)
    results = []
    for norm in (ours, stock):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.backward(upstream.to(out.dtype))
        results.append((out.float(), leaf.grad.float(), norm.weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert ours(x).dtype == dtype
