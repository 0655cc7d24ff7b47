"""ScratchGPT: decoder-only language models from GPT-2 to Qwen3 in one file, as a first-class model of transformers.

Read it top to bottom: norm, rotary positions, attention, MLP and block; then the backbone (`ScratchGPTModel`), the
heads on it, and at the end the cross-entropy that never holds all logits. `configuration_scratch_gpt.py` beside it says
what every switch means. The two files depend on torch and transformers only and travel with every saved model.

Shapes are written (batch, seq, ...), where `seq` counts the tokens of this call and `kv_seq` those and the cached ones.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_liger_kernel_available, is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_scratch_gpt import AUTO_MAP, ScratchGPTConfig


class ScratchGPTRMSNorm(nn.RMSNorm):
    """Divide each vector by its root mean square and scale it by a learned weight (Zhang & Sennrich 2019).

    The statistics are float32 whatever the dtype of the input, which is also the dtype of the output.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # vLLM traces this with torch.fx to put its own kernel here, and a proxy does not say its device.
        traced = isinstance(x, torch.fx.Proxy)
        if not traced and x.device.type == "cpu" and torch.is_grad_enabled() and not is_tracing(x):
            return _RMSNormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """torch has a fused kernel for CUDA; on CPU it strings together a dozen operations, two to four times slower."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x_float = x.float()
        mean_square = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_float * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad = grad.float()
        grad_times_normed = grad * normed
        grad_weight = grad_times_normed.flatten(0, -2).sum(0).to(weight.dtype)
        # d/dx: what is left of grad * weight when its component along x is taken out, over the root mean square
        along_x = (grad_times_normed @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)  # (..., 1)
        grad_x = (grad * weight).addcmul_(normed, along_x, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None


class ScratchGPTLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, also where sharded training has gathered the weights in bfloat16 and the input is float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or self.weight.dtype == torch.float32:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), bias, self.eps)


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _has_intel_cpu() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# MKL multiplies few rows as fast as memory gives the matrix on Intel's processors, and at half that speed on others.
FEW_ROWS_ARE_SLOW = not _has_intel_cpu()
# Without AVX-512, oneDNN's kernel takes longer than MKL again where the outputs are fewer than this.
FEWEST_OUTPUTS = 768 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1


def _is_compiled_training() -> bool:
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting()


class _AddBias(torch.autograd.Function):
    """`x + bias` for the compiler, which joins the sum with the operations around it; the gradient of the bias, a sum over rows
    that the same joining would make slow, is a matrix product.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.bias_dtype = bias.dtype
        return x + bias.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if not ctx.needs_input_grad[1]:
            return grad, None
        rows = grad.flatten(0, -2)
        return grad, (rows.new_ones(1, rows.shape[0]) @ rows)[0].to(ctx.bias_dtype)


class ScratchGPTLinear(nn.Linear):
    """`nn.Linear`, with faster ways through the few rows of a decoding step on CPUs other than Intel's, where the general
    matrix product that torch 2.13 takes is slow.

    The matrices of GPT-2 small for one row in float32, two cores of an AMD EPYC: 20 ms with it, 12 ms with oneDNN's
    kernel, and 11 ms with the loop that `torch.compile` makes of a product of matrix and vector.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            FEW_ROWS_ARE_SLOW
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and x.dtype == self.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and type(self.weight) is nn.Parameter
        ):
            if torch.compiler.is_compiling():
                if x.numel() == self.in_features and not torch.compiler.is_exporting():
                    y = torch.mv(self.weight, x.flatten())
                    return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)
            elif (
                HAS_ONEDNN
                and x.dtype == torch.float32
                and self.out_features >= FEWEST_OUTPUTS
                and 0 < x.numel() <= 8 * self.in_features
                and not is_tracing(x)  # a traced graph may run on other machines
            ):
                return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        elif self.bias is not None and x.device.type == "cpu" and x.ndim > 1 and _is_compiled_training():
            return _AddBias.apply(F.linear(x, self.weight), self.bias)
        return super().forward(x)


def build_linear(config: ScratchGPTConfig, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """:class:`ScratchGPTLinear`, or `nn.Linear` itself in a model that is to be loaded quantized: bitsandbytes and float8 take
    no subclass of it and would leave the weights as they are.
    """
    kind = ScratchGPTLinear if getattr(config, "quantization_config", None) is None else nn.Linear
    return kind(in_features, out_features, bias=bias)


def build_norm(config: ScratchGPTConfig, size: int) -> nn.Module:
    """The norm that the config asks for, over a last dimension of `size`."""
    if config.norm_type == "rmsnorm":
        return ScratchGPTRMSNorm(size, eps=config.layer_norm_epsilon)
    return ScratchGPTLayerNorm(size, eps=config.layer_norm_epsilon, bias=config.norm_bias)


class ScratchGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions (Su et al. 2021), for every `rope_type` of transformers."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ScratchGPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i/head_dim), shape (head_dim / 2,), and the scaling factor 1."""
        base, dim = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `apply_rotary_positions` needs, in the dtype of `x`, each (batch or 1, seq, 1, head_dim)."""
        angles = position_ids[:, :, None, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def apply_rotary_positions(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + head_dim/2]) of `x` (batch, seq, heads, head_dim) by the angles of their positions.

    (a, b) becomes (a cos - b sin, b cos + a sin); `roll` by half a head puts each partner in the other's place.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin


def repeat_kv(hidden_states: torch.Tensor, repeats: int) -> torch.Tensor:
    """(batch, kv_heads, kv_seq, head_dim) to (batch, kv_heads * repeats, kv_seq, head_dim), neighbours alike."""
    if repeats == 1:
        return hidden_states
    batch, kv_heads, kv_seq, head_dim = hidden_states.shape
    hidden_states = hidden_states[:, :, None].expand(batch, kv_heads, repeats, kv_seq, head_dim)
    return hidden_states.reshape(batch, kv_heads * repeats, kv_seq, head_dim)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition (Vaswani et al. 2017, eq. 1), softmax in float32, with the weights as second output."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, seq, kv_seq)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()  # (batch, seq, heads, head_dim)
    return output, weights


def short_bf16_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`sdpa` for short bfloat16 sequences on CPU, by plain matrix products.

    The backward of torch 2.13's CPU kernel is slow there: forward and backward of 8 x 4 heads of 64 take 9.9 ms against
    2.5 ms at 128 tokens, 16.1 against 6.6 ms at 256 (one core of an AMD EPYC), and win only well beyond that.
    """
    seq, kv_seq = query.shape[2], key.shape[2]
    if attention_mask is None:  # means causal
        attention_mask = torch.ones(seq, kv_seq, dtype=torch.bool, device=query.device).tril(kv_seq - seq)
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, hidden)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None


def compiled_bf16_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal `sdpa` without dropout for compiled bfloat16 training on CPU.

    Forward and backward at the shape of GPT-2 small, 4 x 1,024 tokens, take 130 ms against 228 ms of torch 2.13's kernel
    (two cores of an AMD EPYC), at 2 x 2,048 tokens 245 against 327 ms; in float32 as long.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    # Of contiguous heads every block is a view; of others the compiler would make, and keep, a copy of each.
    heads = (tensor.contiguous() for tensor in (query, key, value))
    return _CausalAttentionInBlocks.apply(*heads, scaling).transpose(1, 2), None


class _CausalAttentionInBlocks(torch.autograd.Function):
    """Attention of a block of queries at a time, which leaves out the keys that none of them sees.

    Of the weights nothing is kept: the backward pass makes them again, from the logarithm of the sum of each row's
    exponentials (as Dao et al. 2022, appendix B, but in matrix products that the compiler joins with what lies between).
    Query, key and value are (batch, heads, seq, head_dim).
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling: float):
        positions = _positions(query)
        outputs, log_sums = [], []
        for rows in _blocks(query):
            seen = slice(0, rows.stop)
            later = positions[seen] > positions[rows, None]
            scores = (query[:, :, rows] @ key[:, :, seen].transpose(2, 3)).float() * scaling
            scores = scores.masked_fill(later, -math.inf)
            highest = scores.amax(-1, keepdim=True)
            weights = (scores - highest).exp()
            total = weights.sum(-1, keepdim=True)
            outputs.append((weights.to(value.dtype) @ value[:, :, seen] / total).to(value.dtype))
            log_sums.append(highest + total.log())
        ctx.save_for_backward(query, key, value, torch.cat(log_sums, dim=2))
        ctx.scaling = scaling
        return torch.cat(outputs, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, log_sums = ctx.saved_tensors
        log_sums = log_sums.transpose(2, 3)  # (batch, heads, 1, seq)
        positions = _positions(query)
        # Keys by queries, also because the compiler would keep products that it finds in both passes.
        grad_query, grad_key, grad_value = [], [], []
        for rows in _blocks(query):
            seen = slice(0, rows.stop)
            later = positions[seen, None] > positions[rows]
            scores = (key[:, :, seen] @ query[:, :, rows].transpose(2, 3)).float() * ctx.scaling
            weights = (scores - log_sums[..., rows]).exp().masked_fill(later, 0.0)
            grad_weights = (value[:, :, seen] @ grad[:, :, rows].transpose(2, 3)).float()
            # Of the rounded product, not of grad * output, whose own rounding all keys would have in common.
            mean = (weights * grad_weights).sum(2, keepdim=True)
            grad_scores = (weights * (grad_weights - mean) * ctx.scaling).to(query.dtype)
            unseen = (0, 0, 0, key.shape[2] - rows.stop)
            grad_query.append(grad_scores.transpose(2, 3) @ key[:, :, seen])
            grad_key.append(F.pad(grad_scores @ query[:, :, rows], unseen))
            grad_value.append(F.pad(weights.to(grad.dtype) @ grad[:, :, rows], unseen))
        return torch.cat(grad_query, dim=2), sum(grad_key), sum(grad_value), None


def _blocks(query: torch.Tensor) -> list[slice]:
    """Rows of queries: four blocks at most, as each is code to be compiled, and not below what makes a good matrix product."""
    seq = query.shape[2]
    size = max(128, -(-seq // 4))
    return [slice(start, min(start + size, seq)) for start in range(0, seq, size)]


def _positions(query: torch.Tensor) -> torch.Tensor:
    """1 to seq, by an operation that the compiler does not write into the loops over all scores, where it costs more."""
    return torch.ones(query.shape[2], device=query.device).cumsum(0)


def _bf16_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, attention_mask) -> Callable | None:
    """What is faster than torch's `sdpa` in bfloat16 training on CPU, where something is."""
    on_cpu = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad
    if not on_cpu or torch.compiler.is_exporting():
        return None
    causal = attention_mask is None and query.shape[2] == key.shape[2]
    dropout = module.training and module.attn_dropout.p > 0
    if causal and not dropout and _is_compiled_training():
        return compiled_bf16_attention_forward
    longest = 512 if torch.compiler.is_compiling() else 256
    return short_bf16_attention_forward if query.shape[2] <= longest else None


class ScratchGPTAttention(nn.Module):
    """Causal multi-head attention; fewer key/value heads than query heads make it grouped-query attention."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.use_rope = config.position_embedding_type == "rope" and (
            config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        )

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = build_linear(config, config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = build_linear(config, config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = build_linear(config, config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = build_linear(config, query_size, config.hidden_size, bias=config.attention_out_bias)
        self.o_proj.writes_to_residual_stream = True
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.attn_dropout = nn.Dropout(config.attention_dropout)
        self.resid_dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)  # -1: a tensor-parallel rank holds some of the heads
        query = self.q_proj(hidden_states).view(head_shape)  # (batch, seq, heads, head_dim)
        key = self.k_proj(hidden_states).view(head_shape)  # (batch, seq, kv_heads, head_dim)
        value = self.v_proj(hidden_states).view(head_shape)
        if self.q_norm is not None:
            # The casts matter under autocast only, where norms and angles are float32.
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if self.use_rope:
            cos, signed_sin = (angle.to(value.dtype) for angle in position_embeddings)
            query, key = apply_rotary_positions(query, cos, signed_sin), apply_rotary_positions(key, cos, signed_sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # heads before seq

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (batch, kv_heads, kv_seq, head_dim)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and kwargs.get("is_causal", True):
            attention_interface = _bf16_attention(self, query, key, attention_mask) or attention_interface
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = self.o_proj(output.reshape(*input_shape, -1).contiguous())  # (batch, seq, hidden)
        return self.resid_dropout(output), weights


class ScratchGPTGELU(nn.Module):
    """GPT-2's activation: `0.5 x (1 + tanh(u))` with `u = sqrt(2/pi) (x + 0.044715 x^3)` (Hendrycks & Gimpel 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # The same as x / (1 + exp(-2u)); compiled, torch's tanh takes twice as long as its sigmoid.
            wide = x.float()
            return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
        return F.gelu(x, approximate="tanh")


class ScratchGPTMLP(nn.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__()
        hidden_size, intermediate_size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        gated = config.mlp_type == "gated"
        self.gate_proj = build_linear(config, hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = build_linear(config, hidden_size, intermediate_size, bias=bias)
        self.down_proj = build_linear(config, intermediate_size, hidden_size, bias=bias)
        self.down_proj.writes_to_residual_stream = True
        tanh_gelus = ("gelu_new", "gelu_pytorch_tanh")  # the same function, as eight operations and as one
        self.act_fn = ScratchGPTGELU() if config.hidden_act in tanh_gelus else ACT2FN[config.hidden_act]
        self.resid_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.up_proj(hidden_states))  # (batch, seq, intermediate)
        return self.resid_dropout(self.down_proj(inner))


class ScratchGPTGatedMLP(ScratchGPTMLP):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020). A forward without branches is one that vLLM can fuse."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)  # (batch, seq, intermediate)
        return self.resid_dropout(self.down_proj(inner))


class ScratchGPTBlock(GradientCheckpointingLayer):
    """One layer: attention and MLP, each on a normalised copy of the residual stream and added back to it."""

    def __init__(self, config: ScratchGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = build_norm(config, config.hidden_size)
        self.attn = ScratchGPTAttention(config, layer_idx)
        self.ln_2 = build_norm(config, config.hidden_size)
        self.mlp = ScratchGPTGatedMLP(config) if config.mlp_type == "gated" else ScratchGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class CheckpointMismatchError(ValueError, RuntimeError):
    """The weights of a checkpoint are not those of the model. (For shapes, transformers raises a RuntimeError.)"""


def _enumerate(names, limit: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class ScratchGPTPreTrainedModel(PreTrainedModel):
    """What all ScratchGPT models share: capabilities, initialisation, and saving together with their code."""

    config: ScratchGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScratchGPTBlock, "attentions": ScratchGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal weights; what writes into the residual stream is scaled down by the number of writers (GPT-2)."""
        super()._init_weights(module)
        # Asked of the projection itself: for code outside transformers, modules without own parameters (attention and
        # MLP as a whole) are never handed to this method.
        if getattr(module, "writes_to_residual_stream", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers; where the config pads the vocabulary, it still does afterwards."""
        config, multiple = self.config, self.config.pad_vocab_size_multiple
        if multiple == 1 or new_num_tokens is pad_to_multiple_of is None:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        new_num_tokens = new_num_tokens or config.vocab_size
        new_num_tokens = math.ceil(new_num_tokens / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        try:
            config.vocab_size, config.pad_vocab_size_multiple = config.padded_vocab_size, 1
            rows = math.ceil(new_num_tokens / multiple) * multiple
            return super().resize_token_embeddings(rows, mean_resizing=mean_resizing)
        finally:
            config.vocab_size, config.pad_vocab_size_multiple = new_num_tokens, multiple

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but weights that do not fit the model are an error, not only a report in the log.

        Where another class saved the checkpoint its head may differ: a new head is initialised, a foreign one dropped.
        Adapters and quantized weights are left to transformers. `output_loading_info=True` returns the names of missing
        and unexpected weights and leaves the judgement to the caller.

        Raises:
            CheckpointMismatchError: Weights are missing, unexpected, or of another shape (unless
                `ignore_mismatched_sizes=True`); the message names them.
        """
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        where = pretrained_model_name_or_path or "the state dict"
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            shapes = [f"{name} is {tuple(its)}, not {tuple(ours)}" for name, its, ours in info["mismatched_keys"]]
            raise CheckpointMismatchError(
                f"{where} holds weights of other shapes than this {cls.__name__}: {_enumerate(shapes)}. Load it with the "
                "config that it was saved with, or draw these weights anew with ignore_mismatched_sizes=True"
            )
        if output_loading_info:
            return model, info
        if not model._hf_peft_config_loaded and not hasattr(model, "hf_quantizer"):
            model._refuse_other_names(where, info["missing_keys"], info["unexpected_keys"])
        return model

    def _refuse_other_names(self, where, missing: set[str], unexpected: set[str]) -> None:
        if type(self).__name__ not in (self.config.architectures or ()):  # another class saved it, with its own head
            backbone = {self.base_model_prefix, *(name for name, _ in self.base_model.named_children())}
            missing = {name for name in missing if name.split(".")[0] in backbone}
            unexpected = {name for name in unexpected if name.split(".")[0] in backbone}
        problems = [f"it lacks {_enumerate(missing)}"] if missing else []
        problems += [f"it holds unknown {_enumerate(unexpected)}"] if unexpected else []
        if problems:
            raise CheckpointMismatchError(
                f"{where} does not fit {type(self).__name__}: {'; '.join(problems)}. Load it with the class and the config "
                "that it was saved with, or rename weights with key_mapping={pattern: replacement}; with "
                "output_loading_info=True it is taken as it is, and what it lacks is drawn at random"
            )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with an `auto_map` that names every head, so that any Auto class loads the directory."""
        if self.is_remote_code():
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """The backbone: embeddings, blocks and the final norm. It returns hidden states, not logits."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        config.validate_architecture()  # once more: its fields may have been set since it was built
        self.wte = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding_type == "rope":
            self.rotary_emb = ScratchGPTRotaryEmbedding(config)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.h = nn.ModuleList([ScratchGPTBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.ln_f = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: Token ids (batch, seq). Exactly one of `input_ids` and `inputs_embeds` is needed.
            attention_mask: 1 for real tokens and 0 for padding (batch, kv_seq); or a 4D mask; or one per layer type.
            position_ids: Positions (batch or 1, seq). Without mask and cache, a position that does not follow its
                neighbour starts a new document, and documents do not see each other (packed rows).
            past_key_values: Keys and values of earlier calls.
            inputs_embeds: Embeddings (batch, seq, hidden) in place of `input_ids`.
            use_cache: Whether to return a cache. None is made while training or for packed rows.

        Raises:
            ValueError: Neither or both inputs; a token id outside the vocabulary or a position beyond the learned ones
                (on CPU); a sequence longer than the learned positions; an attention mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)  # (batch, seq, hidden)
        self._check_attention_mask(attention_mask, inputs_embeds, past_key_values)

        if use_cache and past_key_values is None and not self.training and not _is_packed(position_ids, attention_mask):
            past_key_values = DynamicCache(config=self.config)

        # The mask helpers look for packed documents in positions; in ours there are none to be found.
        given_position_ids = position_ids
        if position_ids is None:
            position_ids = self._default_position_ids(attention_mask, inputs_embeds, past_key_values)

        causal_masks = attention_mask
        if not isinstance(causal_masks, dict):  # `generate` may have prepared them
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": given_position_ids,
            }
            causal_masks = {"full_attention": create_causal_mask(**mask_kwargs)}
            if "sliding_attention" in self.config.layer_types:
                causal_masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_kwargs)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "learned":
            hidden_states = hidden_states + self._embed_positions(position_ids)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.drop(hidden_states)

        for layer_idx, block in enumerate(self.h[: self.config.num_hidden_layers]):
            hidden_states = block(
                hidden_states,
                attention_mask=causal_masks[self.config.layer_types[layer_idx]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        if is_tracing(input_ids):
            return self.wte(input_ids)
        vocab_size = self.config.vocab_size
        try:  # asking first would cost a pass over the ids, and on CUDA a synchronisation
            embeddings = self.wte(input_ids)
            rows_of_padding = self.wte.num_embeddings > vocab_size
            if not (rows_of_padding and input_ids.device.type == "cpu" and (input_ids >= vocab_size).any()):
                return embeddings
        except IndexError:
            pass
        raise ValueError(
            f"input_ids range from {input_ids.min().item()} to {input_ids.max().item()}, but vocab_size={vocab_size}: "
            f"ids must lie in [0, {vocab_size - 1}] (is this the tokenizer of another model?)"
        )

    def _embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        if is_tracing(position_ids):
            return self.wpe(position_ids)
        try:
            return self.wpe(position_ids)
        except IndexError:
            raise ValueError(self._too_long(position_ids.max().item() + 1)) from None

    def _too_long(self, length: int) -> str:
        return (
            f"the sequence reaches a length of {length} tokens, but there are only max_position_embeddings="
            f"{self.config.max_position_embeddings} learned positions: shorten it, or train with more positions"
        )

    def _default_position_ids(
        self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions (batch or 1, seq) that go on from the cache; learned ones count real tokens, not left padding."""
        seq = inputs_embeds.shape[1]
        if (
            self.config.position_embedding_type == "learned"
            and isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
        ):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
            return positions.to(inputs_embeds.device)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0  # a tensor for static caches
        limited = self.config.position_embedding_type == "learned" and not is_tracing(inputs_embeds)
        if limited and isinstance(past, int) and past + seq > self.config.max_position_embeddings:
            raise ValueError(self._too_long(past + seq))
        return (torch.arange(seq, device=inputs_embeds.device) + past).unsqueeze(0)

    @staticmethod
    def _check_attention_mask(attention_mask, inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or is_tracing(inputs_embeds):
            return
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(past, int):  # a static cache, whose mask may have the cache's length
            return
        batch, seq = inputs_embeds.shape[:2]
        if attention_mask.shape != (batch, past + seq):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the input has (batch, seq) = "
                f"{(batch, seq)}"
                + (f" and the cache holds {past} more" if past else "")
                + ": give one 0 or 1 per token"
            )


def _check_labels(labels: torch.Tensor, num_classes: int, field: str, ignore_index: int = -100) -> None:
    """Only on CPU, where it is cheap: on CUDA the question alone would wait for the device."""
    if labels.device.type != "cpu" or labels.is_floating_point() or is_tracing(labels):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise ValueError(
            f"labels hold {labels[wrong][0].item()}, but {field}={num_classes}: they must lie in [0, {num_classes - 1}], "
            f"or be {ignore_index} where no loss is wanted"
        )


def _is_packed(position_ids: torch.Tensor | None, attention_mask) -> bool:
    """Whether positions restart inside a row. A cache would switch off the mask that keeps its documents apart."""
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] == 1 or is_tracing(position_ids):
        return False
    return find_packed_sequence_indices(position_ids) is not None


class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):
    """The language model: the backbone and a linear head over the vocabulary, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.transformer = ScratchGPTModel(config)
        self.lm_head = build_linear(config, config.hidden_size, config.padded_vocab_size, bias=False)
        self._forward_runs = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab) and, with labels, the mean next-token cross-entropy in nats.

        Args:
            labels: Token ids (batch, seq), shifted inside; -100 marks tokens without loss. `shift_labels=` gives labels
                that are shifted already, `num_items_in_batch=` divides the sum of the losses in place of their count.
            logits_to_keep: Compute logits for the last n positions only (0: all), or for the positions of a tensor.
            skip_logits: Compute the loss without ever holding all logits, and return none. Default (`None`): when
                training with labels. `False` gives both loss and logits.

        The other arguments are those of `ScratchGPTModel`.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = _kept(outputs.last_hidden_state, logits_to_keep)

        targets = labels if labels is not None else kwargs.get("shift_labels")
        has_labels = targets is not None
        if has_labels:
            _check_labels(targets, self.config.vocab_size, "vocab_size", kwargs.get("ignore_index", -100))
        if skip_logits is None:
            skip_logits = self.training and has_labels
        logits, loss = None, None
        if skip_logits and has_labels and self._head_is_plain():
            loss = self._loss_without_logits(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)[..., : self.config.vocab_size]  # (batch, seq, vocab)
            if (cap := self.config.final_logit_softcapping) is not None:
                logits = cap * torch.tanh(logits / cap)
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _head_is_plain(self) -> bool:
        """Whether the head is one local matrix and the loss the standard one; if not, the logits are needed."""
        return (
            type(self.lm_head) in (nn.Linear, ScratchGPTLinear)
            and type(self.lm_head.weight) in (nn.Parameter, torch.Tensor)
            and not hasattr(self, "_loss_function")
        )

    def _loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs,
    ) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # tokens < n predict token n
        return linear_cross_entropy(
            hidden_states.flatten(0, -2),
            self.lm_head.weight,
            shift_labels.flatten().to(hidden_states.device),
            bias=self.lm_head.bias,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            softcap=self.config.final_logit_softcapping,
            vocab_size=self.config.vocab_size,
        )

    def __call__(self, *args, **kwargs):
        self._forward_runs = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._forward_runs = False

    def get_output_embeddings(self) -> nn.Module:
        """The head. One with rows of padding is shown without them to a forward pass that multiplies by it itself.

        That is TRL's way to the loss, which puts its own in place of `forward`. Whoever asks from outside wants the module
        that holds the parameters: PEFT to leave it out, Accelerate to shard it together with the embedding that it is tied
        to, quantizers to keep it as it is.
        """
        head, vocab_size = self.lm_head, self.config.vocab_size
        if self.config.padded_vocab_size == vocab_size or not self._forward_runs:
            return head
        shown = nn.Linear(head.in_features, vocab_size, bias=False, device="meta")
        del shown.weight
        shown.weight = head.weight[:vocab_size]
        return shown


def _kept(hidden_states: torch.Tensor, which: int | torch.Tensor) -> torch.Tensor:
    """Of the hidden states (batch, seq, hidden), those whose logits are wanted.

    Args:
        which: So many at the end, 0 for all; or positions (kept,), or of each row its own (batch, kept); or a mask
            (batch, seq), which gives (kept, hidden). Transformers has this from 5.21 on, and vLLM asks for one before.
    """
    if isinstance(which, int):
        return hidden_states[:, slice(-which, None)]
    if which.ndim == 1:
        return hidden_states[:, which]
    if which.dtype == torch.bool:
        return hidden_states[which]
    return torch.take_along_dim(hidden_states, which[..., None], dim=1)


class ScratchGPTForSequenceClassification(ScratchGPTPreTrainedModel):
    """One vector of `num_labels` scores per sequence, read at its last token. With one label: a reward model."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ScratchGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Scores (batch, num_labels) and, with labels, the loss of `config.problem_type`.

        The last token of a row is the last that its attention mask admits (so an end-of-text token counts even where
        it is the padding token, too); without a mask, the last that is not `pad_token_id`.

        Raises:
            ValueError: Several rows, no attention mask and no `pad_token_id` to find their ends with.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)  # (batch, seq, num_labels)
        batch, seq = logits.shape[:2]

        real_tokens = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            real_tokens = attention_mask[:, -seq:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real_tokens = input_ids != self.config.pad_token_id
        elif batch != 1 and input_ids is not None:
            raise ValueError(
                f"the batch has {batch} rows, but neither attention_mask nor config.pad_token_id says where they end"
            )
        if real_tokens is None:
            pooled_logits = logits[:, -1]
        else:
            last_token = (real_tokens.to(logits.device) * torch.arange(seq, device=logits.device)).argmax(-1)
            pooled_logits = logits[torch.arange(batch, device=logits.device), last_token]  # (batch, num_labels)

        loss = None
        if labels is not None:
            if self.num_labels > 1 and self.config.problem_type in (None, "single_label_classification"):
                _check_labels(labels, self.num_labels, "num_labels")
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ScratchGPTForTokenClassification(ScratchGPTPreTrainedModel):
    """`num_labels` scores for every token."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ScratchGPTModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Scores (batch, seq, num_labels) and, with labels (batch, seq), their mean cross-entropy."""
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            _check_labels(labels, self.num_labels, "num_labels")
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ScratchGPTForQuestionAnswering(ScratchGPTPreTrainedModel):
    """Two scores for every token: how well an answer would start there, and end there (Devlin et al. 2018, section 4.2)."""

    def __init__(self, config: ScratchGPTConfig):
        super().__init__(config)
        self.transformer = ScratchGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Start and end scores, each (batch, seq), and, with both positions (batch,), the mean of their cross-entropies.

        A position beyond the sequence does not count.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The loss without the logits
#
# A batch of 8 x 1,024 tokens over 50,257 words has 1.6 GB of float32 logits, and their gradient is as large. Both are
# needed for a moment only: this function walks over the tokens in chunks and turns each chunk's logits into gradients
# before it forgets them (as in Hsu et al. 2024, "Liger Kernel").
# ---------------------------------------------------------------------------------------------------------------------

# Tokens per chunk, enough to pay for adding up the head's gradient once per chunk (1,024 x 50,257 logits are 103 MB in
# bfloat16). On CPU half as many take no longer, and a small vocabulary's logits stay in the cache.
CHUNK_SIZE, CHUNK_SIZE_CPU = 1024, 512
# Between the matrix products of a chunk, so many logits at a time go through the float32 softmax: on CPU they stay in the
# cache, elsewhere they are few enough not to count.
PIECE_SIZE, PIECE_SIZE_CPU = 2**24, 2**19


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)` that holds the logits of one chunk of tokens at a time.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden), and bias (vocab,).
        labels: (tokens,); `ignore_index` marks tokens without loss.
        num_items_in_batch: Divisor of the summed loss. Default: the number of labels that count.
        softcap: `c` in `logits = c * tanh(logits / c)`.
        vocab_size: Leave out the rows of `weight` from this one on; they are padding.
        chunk_size: Tokens per chunk, by default chosen for speed and memory.

    On CUDA this is the kernel of the package liger-kernel where that is installed.

    Returns:
        The loss in nats, a float32 scalar. Softmax statistics are float32 whatever the dtype of the matrices, and under
        autocast the matrix products run in autocast's dtype.
    """
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"there are {hidden.shape[0]} hidden states, but {labels.numel()} labels: give one per token")
    if num_items_in_batch is None:
        divisor = (labels != ignore_index).sum()
    else:
        divisor = torch.as_tensor(num_items_in_batch, device=hidden.device)
    if vocab_size is None:
        vocab_size = weight.shape[0]
    if (liger := _liger_kernel(hidden.device)) is not None:
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        total = liger(ignore_index=ignore_index, reduction="sum", softcap=softcap, accum_dtype=torch.float32)
        bias = bias[:vocab_size].to(dtype) if bias is not None else None
        return total(weight[:vocab_size].to(dtype), hidden.to(dtype), labels, bias).float() / divisor
    if chunk_size is None:
        chunk_size = CHUNK_SIZE_CPU if hidden.device.type == "cpu" else CHUNK_SIZE
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, divisor, ignore_index, softcap, vocab_size, chunk_size, torch.is_grad_enabled()
    )


def _liger_kernel(device: torch.device):
    """The class of the kernel, or None. It is looked up by name, or every machine that loads this file would need it."""
    if device.type != "cuda" or not is_liger_kernel_available():
        return None
    return importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, divisor, ignore_index, softcap, vocab_size, chunk_size, grad_enabled
    ):
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        scale = 1.0 / divisor.float()
        # A gradient divided by the tokens of a large step would vanish in float16, before the caller's loss scaling comes
        # to its help in the backward pass: there it is divided then.
        early, late = (1.0, scale) if dtype == torch.float16 else (scale, None)

        need_any = need_hidden or need_weight or need_bias
        piece = max(1, (PIECE_SIZE_CPU if device_type == "cpu" else PIECE_SIZE) // weight.shape[0])  # rows
        if torch.compiler.is_compiling():  # the compiler would unroll the pieces, and it joins the operations by itself
            piece = chunk_size

        with torch.autocast(device_type, enabled=False):
            matrix = weight.to(dtype)
            space = matrix.new_empty(min(chunk_size, hidden.shape[0]), weight.shape[0])
            for start in range(0, hidden.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                chunk = hidden[rows].to(dtype)  # (chunk, hidden)
                logits = torch.mm(chunk, matrix.t(), out=space[: len(chunk)])  # (chunk, vocab), and soon their gradient
                targets = labels[rows].unsqueeze(1)  # (chunk, 1)
                row_scale = (targets != ignore_index) * early
                targets = targets.masked_fill(targets == ignore_index, 0)
                for some in zip(logits.split(piece), targets.split(piece), row_scale.split(piece), strict=True):
                    loss += _loss_of_piece(*some, bias, softcap, vocab_size, need_any, grad_bias)
                if need_hidden:
                    grad_hidden[rows] = logits @ matrix
                if need_weight:
                    if dtype == torch.float32:
                        grad_weight.addmm_(logits.t(), chunk)
                    else:
                        _add_product(grad_weight, logits.t(), chunk)
        if late is not None:
            loss *= late

        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            late,
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # A grad_loss other than 1 is a loss scaled by the caller (gradient accumulation, mixed objectives).
        *grads, late = ctx.saved_tensors
        if late is not None:
            grad_loss = grad_loss * late
        scaled = grad_loss.device.type != "cpu" or is_tracing(grad_loss) or grad_loss.item() != 1.0
        if scaled:
            grads = [grad * grad_loss.to(grad.dtype) if grad is not None else None for grad in grads]
        return *grads, None, None, None, None, None, None, None


# So many rows of the head's gradient at a time on CPU: torch copies them into float32 before it adds them up, and the copy
# should stay in the cache.
HEAD_ROWS_CPU = 4096


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`, where the product is of another dtype."""
    rows = HEAD_ROWS_CPU if total.device.type == "cpu" and not torch.compiler.is_compiling() else len(total)
    for some, factor in zip(total.split(rows), a.split(rows), strict=True):
        some += factor @ b


def _loss_of_piece(logits, targets, row_scale, bias, softcap, vocab_size, need_gradient, grad_bias):
    """The loss of some rows of logits (rows, vocab), which are overwritten with its gradient.

    d loss / d logits = (softmax - one_hot) * row_scale, where row_scale (rows, 1) is 1 / divisor and zero for ignored
    tokens. `grad_bias` is added to.
    """
    scores = logits.float() if bias is None else logits.float() + bias.float()
    if softcap is not None:
        squashed = (scores / softcap).tanh_()
        scores = squashed * softcap
    if vocab_size < scores.shape[1]:
        scores = scores.index_fill(1, torch.arange(vocab_size, scores.shape[1], device=scores.device), -math.inf)
    of_targets, largest = scores.gather(1, targets), scores.amax(-1, keepdim=True)
    probs = torch.softmax(scores, dim=-1)
    # The largest of them is 1 / sum(exp(scores - largest)), so that no exponential is taken twice.
    loss = ((largest - of_targets - probs.amax(-1, keepdim=True).log()) * row_scale).sum()
    if need_gradient:
        gradient = probs.mul_(row_scale)
        gradient.scatter_add_(1, targets, -row_scale)
        if softcap is not None:
            gradient.mul_(1 - squashed * squashed)  # d tanh
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
        logits.copy_(gradient)
    return loss


# `AutoModel.register` fills the lazy mappings but not these tables of names, which Trainer reads to know that a model
# predicts the next token (label smoothing would otherwise forget the shift).
for _names, _model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, ScratchGPTModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ScratchGPTForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ScratchGPTForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ScratchGPTForTokenClassification),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ScratchGPTForQuestionAnswering),
):
    _names.setdefault(ScratchGPTConfig.model_type, _model_class.__name__)


class _WhenPeftComes(importlib.abc.MetaPathFinder):
    """Tells PEFT what `LoraConfig()` adapts when it is given no target_modules, every projection of every layer, as soon as
    it is imported, which takes a second that not every process has to spend.
    """

    table = "peft.utils.constants"

    def find_spec(self, fullname, path, target=None):
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_tell(module):
            execute(module)
            self.tell(module)

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec

    @staticmethod
    def tell(module) -> None:
        module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(
            ScratchGPTConfig.model_type, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )


if _WhenPeftComes.table in sys.modules:
    _WhenPeftComes.tell(sys.modules[_WhenPeftComes.table])
else:
    sys.meta_path.insert(0, _WhenPeftComes())


__all__ = [
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
]
