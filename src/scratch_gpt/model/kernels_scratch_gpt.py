"""CPU fast paths of ScratchGPT, for the operations that torch 2.13 runs slowly.

Every `choose_…` function below states when a fast path is taken, and returns it, or `None` for the plain operation that
stands in `modeling_scratch_gpt.py`. A fast path changes the time and at most the last bits of a result, never its
meaning: its docstring begins with the plain definition that it computes. Nothing here is taken on GPUs, in `torch.jit`
traces or in exported graphs, which may run on other machines.

| operation | condition (on a CPU)                            | gain                                                        |
|-----------|-------------------------------------------------|-------------------------------------------------------------|
| RMSNorm   | eager, with gradients                           | 2 to 4 times faster than torch's composition                |
| linear    | up to 8 rows without gradients, not Intel       | the matrices of GPT-2 small for 1 row: 20 ms to 12 ms (eager), 11 ms (compiled) |
| linear    | with bias, compiled training                    | the bias gradient is a matrix product                       |
| attention | bfloat16 training, eager, up to 256 tokens      | 8 x 4 heads of 64, 128 tokens: 9.9 ms to 2.5 ms; 256: 16.1 to 6.6 |
| attention | bfloat16 training, compiled, causal, no dropout | GPT-2 small, 4 x 1,024 tokens: 228 ms to 130 ms             |
| GELU      | compiled                                        | torch's compiled tanh takes twice as long as its sigmoid    |

(Times: forward and backward on one or two cores of an AMD EPYC.)
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_tracing

# ---------------------------------------------------------------------------------------------------------------------
# When each fast path is taken
# ---------------------------------------------------------------------------------------------------------------------

HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _has_intel_cpu() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# MKL multiplies a few rows as fast as memory delivers the matrix on Intel's processors, and at half that speed on others.
FEW_ROWS_ARE_SLOW = not _has_intel_cpu()
MAX_FEW_ROWS = 8
# Without AVX-512, oneDNN's kernel is slower than MKL for fewer outputs than this.
MIN_ONEDNN_OUTPUTS = 768 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1
# The longest sequence for which attention by plain matrix products beats torch's fused kernel in bfloat16 training.
MAX_SHORT_ATTENTION, MAX_SHORT_ATTENTION_COMPILED = 256, 512


def is_compiled_training() -> bool:
    """Whether `torch.compile` traces a forward pass with gradients (an export is none)."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting()


def choose_rms_norm(x: torch.Tensor) -> Callable | None:
    """:func:`cpu_rms_norm` for eager training on CPU, where torch has no fused kernel and strings together a dozen
    operations.
    """
    # vLLM traces the norm with torch.fx to recognize it, and a proxy does not know its device.
    traced = isinstance(x, torch.fx.Proxy)
    if not traced and x.device.type == "cpu" and torch.is_grad_enabled() and not is_tracing(x):
        return cpu_rms_norm
    return None


def choose_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable | None:
    """:func:`matrix_vector_linear` or :func:`onednn_linear` for the few rows of a decoding step on CPUs other than Intel's,
    :func:`linear_with_matmul_bias_gradient` for compiled training on CPU.
    """
    if (
        FEW_ROWS_ARE_SLOW
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and type(weight) is nn.Parameter
    ):
        if torch.compiler.is_compiling():
            if x.numel() == weight.shape[1] and not torch.compiler.is_exporting():
                return matrix_vector_linear
        elif (
            HAS_ONEDNN
            and x.dtype == torch.float32
            and weight.shape[0] >= MIN_ONEDNN_OUTPUTS
            and 0 < x.numel() <= MAX_FEW_ROWS * weight.shape[1]
            and not is_tracing(x)
        ):
            return onednn_linear
    elif bias is not None and x.device.type == "cpu" and x.ndim > 1 and is_compiled_training():
        return linear_with_matmul_bias_gradient
    return None


def choose_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> Callable | None:
    """:func:`blockwise_bf16_attention` or :func:`short_bf16_attention` in bfloat16 training on CPU, in place of `sdpa`.

    Blockwise attention is for compiled training without mask, cached tokens and dropout.
    """
    bf16_training = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad
    if not bf16_training or torch.compiler.is_exporting():
        return None
    causal = attention_mask is None and query.shape[2] == key.shape[2]
    dropout = module.training and module.attn_dropout.p > 0
    if causal and not dropout and is_compiled_training():
        return blockwise_bf16_attention
    longest = MAX_SHORT_ATTENTION_COMPILED if torch.compiler.is_compiling() else MAX_SHORT_ATTENTION
    return short_bf16_attention if query.shape[2] <= longest else None


def choose_gelu(x: torch.Tensor) -> Callable | None:
    """:func:`sigmoid_gelu` in graphs compiled for CPUs."""
    if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return sigmoid_gelu
    return None


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm
# ---------------------------------------------------------------------------------------------------------------------


def cpu_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension, in float32, returned in the dtype of `x`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
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
        grad_weight = grad_times_normed.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # grad_x = (grad * weight - normed * mean(grad * weight * normed)) / rms
        mean = (grad_times_normed @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)  # (..., 1)
        grad_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None


# ---------------------------------------------------------------------------------------------------------------------
# Linear
# ---------------------------------------------------------------------------------------------------------------------


def matrix_vector_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` for a single row: `torch.compile` makes one loop of the product."""
    y = torch.mv(weight, x.flatten())
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[0])


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` by oneDNN's kernel."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_with_matmul_bias_gradient(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`, whose sum the compiler fuses with the operations around it."""
    return _AddBias.apply(F.linear(x, weight), bias)


class _AddBias(torch.autograd.Function):
    """`x + bias`. The gradient of the bias, a sum over rows that fusion would make slow, is a matrix product."""

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


# ---------------------------------------------------------------------------------------------------------------------
# Attention: softmax(query @ key.T * scaling + mask) @ value, query (batch, heads, seq, head_dim), result transposed
# ---------------------------------------------------------------------------------------------------------------------


def _repeat_heads(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """(batch, kv_heads, kv_seq, head_dim) to (batch, kv_heads * repeats, kv_seq, head_dim), each head `repeats` times."""
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def short_bf16_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The definition itself, softmax in float32, with the masks of `sdpa` (`None`: causal; or boolean): the backward pass
    of torch's CPU kernel is slow for short sequences.
    """
    seq, kv_seq = query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(seq, kv_seq, dtype=torch.bool, device=query.device).tril(kv_seq - seq)
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, hidden)
    key = _repeat_heads(key, module.num_key_value_groups)
    value = _repeat_heads(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling + attention_mask  # (batch, heads, seq, kv_seq)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None  # (batch, seq, heads, head_dim)


def blockwise_bf16_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The definition for causal attention without dropout, one block of queries at a time.

    2 x 2,048 tokens at the shape of GPT-2 small take 245 ms against 327 ms of torch's kernel; in float32 as long.
    """
    key = _repeat_heads(key, module.num_key_value_groups)
    value = _repeat_heads(value, module.num_key_value_groups)
    # Every block of contiguous heads is a view; the compiler would make, and keep, a copy of other blocks.
    heads = (tensor.contiguous() for tensor in (query, key, value))
    return _BlockwiseCausalAttention.apply(*heads, scaling).transpose(1, 2), None


class _BlockwiseCausalAttention(torch.autograd.Function):
    """Attention for a block of queries at a time, which skips the keys that none of them sees.

    No weights are saved: the backward pass recomputes them from the log of the sum of each query's exponentials (as
    Dao et al. 2022, appendix B, but in matrix products that the compiler fuses with what lies between).
    Query, key and value are (batch, heads, seq, head_dim).
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling: float):
        positions = _positions(query)
        outputs, log_sums = [], []
        for block in _query_blocks(query):
            visible = slice(0, block.stop)
            future = positions[visible] > positions[block, None]
            scores = (query[:, :, block] @ key[:, :, visible].transpose(2, 3)).float() * scaling
            scores = scores.masked_fill(future, -math.inf)
            highest = scores.amax(-1, keepdim=True)
            weights = (scores - highest).exp()
            total = weights.sum(-1, keepdim=True)
            outputs.append((weights.to(value.dtype) @ value[:, :, visible] / total).to(value.dtype))
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
        # Keys by queries, also because the compiler would save products that it finds in both passes.
        grad_query, grad_key, grad_value = [], [], []
        for block in _query_blocks(query):
            visible = slice(0, block.stop)
            future = positions[visible, None] > positions[block]
            scores = (key[:, :, visible] @ query[:, :, block].transpose(2, 3)).float() * ctx.scaling
            weights = (scores - log_sums[..., block]).exp().masked_fill(future, 0.0)
            grad_weights = (value[:, :, visible] @ grad[:, :, block].transpose(2, 3)).float()
            # The mean of the rounded product, not of grad * output, whose own rounding all keys would share.
            mean = (weights * grad_weights).sum(2, keepdim=True)
            grad_scores = (weights * (grad_weights - mean) * ctx.scaling).to(query.dtype)
            invisible = (0, 0, 0, key.shape[2] - block.stop)
            grad_query.append(grad_scores.transpose(2, 3) @ key[:, :, visible])
            grad_key.append(F.pad(grad_scores @ query[:, :, block], invisible))
            grad_value.append(F.pad(weights.to(grad.dtype) @ grad[:, :, block], invisible))
        return torch.cat(grad_query, dim=2), sum(grad_key), sum(grad_value), None


def _query_blocks(query: torch.Tensor) -> list[slice]:
    """At most four blocks of queries, as each is code to compile, of at least 128, for efficient matrix products."""
    seq = query.shape[2]
    size = max(128, -(-seq // 4))
    return [slice(start, min(start + size, seq)) for start in range(0, seq, size)]


def _positions(query: torch.Tensor) -> torch.Tensor:
    """1 to seq, by an operation that the compiler does not fuse into the loops over all scores, where it costs more."""
    return torch.ones(query.shape[2], device=query.device).cumsum(0)


# ---------------------------------------------------------------------------------------------------------------------
# GELU
# ---------------------------------------------------------------------------------------------------------------------


def sigmoid_gelu(x: torch.Tensor) -> torch.Tensor:
    """`0.5 x (1 + tanh(u)) = x * sigmoid(2u)` with `u = sqrt(2/pi) (x + 0.044715 x**3)`, in float32."""
    x_float = x.float()
    return (x_float * torch.sigmoid(math.sqrt(8 / math.pi) * (x_float + 0.044715 * x_float**3))).to(x.dtype)
