"""Small models of both styles, with weights large enough that a wrong position or mask shows in the logits."""

import pytest
import torch

from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
STYLES = {
    "gpt2": {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "mlp_type": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
    },
    "modern": {"num_key_value_heads": 2, "head_dim": 16},
    "mixture": {
        "num_key_value_heads": 1,
        "no_rope_layer_interval": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "final_logit_softcapping": 5.0,
        "hidden_act": "relu2",
        "norm_type": "layernorm",
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(params=list(STYLES))
def style(request) -> str:
    return request.param


@pytest.fixture
def build():
    """`build("modern", **fields)`: a small model in evaluation mode, the same for the same arguments."""

    def _build(style: str = "modern", model_class=ScratchGPTForCausalLM, attn: str = "sdpa", **fields):
        torch.manual_seed(0)
        config = ScratchGPTConfig(**{**SIZE, **STYLES[style], **fields})
        model = model_class._from_config(config, attn_implementation=attn)
        with torch.no_grad():  # biases and norms away from the 0 and 1 they start at
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        return model.eval()

    return _build


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (2, 12)."""
    return torch.randint(1, SIZE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
