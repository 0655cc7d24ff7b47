"""Cross-entropy of a linear head that never holds the logits of all tokens.

A batch of 8 x 1,024 tokens over a vocabulary of 50,257 has 1.6 GB of float32 logits, and their gradient is as large. Both
are needed for a moment only: :func:`linear_cross_entropy` walks over the tokens in chunks and turns the logits of each
chunk into gradients before it frees them (as in Hsu et al. 2024, "Liger Kernel").
"""

import importlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_liger_kernel_available, is_tracing

# Tokens per chunk: enough to amortize accumulating the head's gradient once per chunk (1,024 x 50,257 logits are 103 MB in
# bfloat16). On CPU half as many are as fast, and the logits of a small vocabulary stay in the cache.
CHUNK_SIZE, CHUNK_SIZE_CPU = 1024, 512
# Logits per float32 softmax, between the matrix products of a chunk: on CPU they stay in the cache, elsewhere their memory
# is negligible.
SOFTMAX_SIZE, SOFTMAX_SIZE_CPU = 2**24, 2**19


def check_labels(labels: torch.Tensor, num_classes: int, field: str, ignore_index: int = -100) -> None:
    """Refuse labels outside [0, num_classes) that are not `ignore_index`, naming the config's `field`.

    Checked on CPU only, where it is cheap; on CUDA the check would wait for the device.

    Raises:
        ValueError: There is such a label.
    """
    if labels.device.type != "cpu" or labels.is_floating_point() or is_tracing(labels):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise ValueError(
            f"labels hold {labels[wrong][0].item()}, but {field}={num_classes}: they must lie in [0, {num_classes - 1}], "
            f"or be {ignore_index} for tokens without loss"
        )


def causal_lm_loss_without_logits(
    hidden_states: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    vocab_size: int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of hidden states (batch, seq, hidden), with the keywords of transformers' losses.

    Either `labels` (batch, seq), the input tokens, or `shift_labels`, the token after each position, is needed.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # tokens < n predict token n
    return linear_cross_entropy(
        hidden_states.flatten(0, -2),
        head.weight,
        shift_labels.flatten().to(hidden_states.device),
        bias=head.bias,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        softcap=softcap,
        vocab_size=vocab_size,
    )


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
    """Compute `cross_entropy(hidden @ weight.T + bias, labels)`, holding the logits of one chunk of tokens at a time.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden), and bias (vocab,).
        labels: (tokens,); `ignore_index` marks tokens without loss.
        num_items_in_batch: Divisor of the summed loss. Default: the number of labels that are not ignored.
        softcap: `c` in `logits = c * tanh(logits / c)`.
        vocab_size: Number of tokens; further rows of `weight` are padding and excluded. Default: all rows.
        chunk_size: Tokens per chunk. Default: `CHUNK_SIZE`, on CPU `CHUNK_SIZE_CPU`.

    On CUDA this runs the kernel of the package liger-kernel if that is installed.

    Returns:
        The loss in nats, a float32 scalar. Softmax statistics are float32 whatever the dtype of the matrices, and under
        autocast the matrix products run in autocast's dtype.

    Raises:
        ValueError: The number of labels is not the number of hidden states.
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
    """The loss class of liger-kernel, or None. Imported by name: transformers would require a plain import of every machine
    that loads this file as remote code.
    """
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
        # In float16, a gradient divided by the tokens of a large step would underflow before the loss scaling of the
        # backward pass takes effect: there it is divided in the backward pass.
        early, late = (1.0, scale) if dtype == torch.float16 else (scale, None)

        need_any = need_hidden or need_weight or need_bias
        softmax_rows = max(1, (SOFTMAX_SIZE_CPU if device_type == "cpu" else SOFTMAX_SIZE) // weight.shape[0])
        if torch.compiler.is_compiling():  # the compiler would unroll the loop, and fuses the operations by itself
            softmax_rows = chunk_size

        with torch.autocast(device_type, enabled=False):
            matrix = weight.to(dtype)
            buffer = matrix.new_empty(min(chunk_size, hidden.shape[0]), weight.shape[0])
            for start in range(0, hidden.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                chunk = hidden[rows].to(dtype)  # (chunk, hidden)
                # (chunk, vocab), overwritten by their gradient below
                logits = torch.mm(chunk, matrix.t(), out=buffer[: len(chunk)])
                targets = labels[rows].unsqueeze(1)  # (chunk, 1)
                row_scale = (targets != ignore_index) * early
                targets = targets.masked_fill(targets == ignore_index, 0)
                blocks = (logits.split(softmax_rows), targets.split(softmax_rows), row_scale.split(softmax_rows))
                for some_logits, some_targets, some_scale in zip(*blocks, strict=True):
                    loss += _softmax_loss(
                        some_logits, some_targets, some_scale, bias, softcap, vocab_size, need_any, grad_bias
                    )
                if need_hidden:
                    grad_hidden[rows] = logits @ matrix
                if need_weight:
                    if dtype == torch.float32:
                        grad_weight.addmm_(logits.t(), chunk)
                    else:
                        _add_matmul(grad_weight, logits.t(), chunk)
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


# Rows of the head's gradient accumulated at a time on CPU: torch copies them to float32 before adding them, and the copy
# should stay in the cache.
HEAD_ROWS_CPU = 4096


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute `total += a @ b`, where the product has another dtype."""
    rows = HEAD_ROWS_CPU if total.device.type == "cpu" and not torch.compiler.is_compiling() else len(total)
    for block, factor in zip(total.split(rows), a.split(rows), strict=True):
        block += factor @ b


def _softmax_loss(logits, targets, row_scale, bias, softcap, vocab_size, need_gradient, grad_bias):
    """Sum the loss over logits (tokens, vocab) and overwrite them with its gradient.

    d loss / d logits = (softmax - one_hot) * row_scale, where row_scale (tokens, 1) is 1 / divisor and zero for ignored
    tokens. The gradient of the bias is added to `grad_bias`.
    """
    scores = logits.float() if bias is None else logits.float() + bias.float()
    if softcap is not None:
        squashed = (scores / softcap).tanh_()
        scores = squashed * softcap
    if vocab_size < scores.shape[1]:
        scores = scores.index_fill(1, torch.arange(vocab_size, scores.shape[1], device=scores.device), -math.inf)
    target_scores, largest = scores.gather(1, targets), scores.amax(-1, keepdim=True)
    probs = torch.softmax(scores, dim=-1)
    # The largest probability is 1 / sum(exp(scores - largest)), so that no exponential is computed twice.
    loss = ((largest - target_scores - probs.amax(-1, keepdim=True).log()) * row_scale).sum()
    if need_gradient:
        gradient = probs.mul_(row_scale)
        gradient.scatter_add_(1, targets, -row_scale)
        if softcap is not None:
            gradient.mul_(1 - squashed * squashed)  # d tanh
        if grad_bias is not None:
            grad_bias += gradient.sum(0)
        logits.copy_(gradient)
    return loss
