"""The memory of one training step on one device, beyond weights, gradients and optimizer state.

Derived from the code of the model; nothing here is fitted. Two parts: the tensors that the forward pass saves for the
backward pass, as a table with one entry for each line of the modeling code that saves one, and the temporary tensors at
the worst moment of the step. The tests compare both with measured bytes.

The formulas describe this package's training: weights, gradients, optimizer state and the residual stream in float32,
and matrix products under autocast in bfloat16 (bf16), float16 (fp16) or, inside the blocks, float8 (fp8, which saves no
float8 tensor). fp32 means no autocast.
"""

from dataclasses import dataclass
from typing import Literal

from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.kernels_scratch_gpt import MAX_SHORT_ATTENTION
from scratch_gpt.model.loss_scratch_gpt import (
    CHUNK_SIZE,
    CHUNK_SIZE_CPU,
    HEAD_ROWS_CPU,
    SOFTMAX_SIZE,
    SOFTMAX_SIZE_CPU,
)

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
FP32, BF16, INT64 = 4, 2, 8


@dataclass(frozen=True)
class Workload:
    """One forward and backward pass on one device."""

    sequences: int
    """Device batch size."""
    context_length: int
    precision: Precision = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"
    checkpointing: bool = False
    """Activation checkpointing: each block saves only its input and is recomputed in the backward pass."""
    tensor_parallel: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.context_length

    @property
    def matmul_bytes(self) -> int:
        """Bytes of one element in matrix products."""
        return BF16 if self.uses_autocast else FP32

    @property
    def uses_autocast(self) -> bool:
        return self.precision != "fp32"

    @property
    def copies_weights(self) -> bool:
        """Whether the backward pass reads 16-bit copies of the weights. Float8 layers read the weights themselves."""
        return self.precision in ("bf16", "fp16")


# ------------------------------------------------------------------------------------------------ saved activations


@dataclass(frozen=True)
class SavedActivation:
    """A tensor that the forward pass keeps for the backward pass."""

    name: str
    elements: float
    """Number of elements for each unit of `per`."""
    element_bytes: int
    tp_sharded: bool = False
    """Whether tensor parallelism shards it, so that a device holds 1 / tensor_parallel of the elements."""
    per: Literal["token", "position", "model"] = "token"
    """token: grows with batch and context; position: with the context only; model: with neither."""

    def size(self, workload: Workload) -> float:
        """Bytes on one device."""
        count = {"token": workload.tokens, "position": workload.context_length, "model": 1}[self.per]
        return self.elements * self.element_bytes * count / (workload.tensor_parallel if self.tp_sharded else 1)


def saved_in_block(config: ScratchGPTConfig, layer: int, workload: Workload) -> list[SavedActivation]:
    """Everything that one block saves, in the order of its forward pass, except its weights."""
    low = workload.matmul_bytes
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        *_norm("ln_1", hidden, FP32, 1, config),
        # Under autocast each projection casts its own 16-bit copy; in float32 all share the norm's output.
        SavedActivation("input of q_proj, k_proj, v_proj", hidden * _saved_copies(3, workload), low),
        *_attention(config, layer, workload),
        *_dropout("mask of attn.resid_dropout", hidden, low, config.hidden_dropout, workload),
        *_norm("ln_2", hidden, FP32, 1, config),
        SavedActivation(
            "input of gate_proj, up_proj", hidden * _saved_copies(2 if config.mlp_type == "gated" else 1, workload), low
        ),
        *_mlp(config, inner, low),
        *_dropout("mask of mlp.resid_dropout", hidden, low, config.hidden_dropout, workload),
    ]


def _saved_copies(readers: int, workload: Workload) -> int:
    return readers if workload.uses_autocast else 1


def _norm(
    name: str, size: int, element: int, vectors: int, config: ScratchGPTConfig, tp_sharded: bool = False
) -> list[SavedActivation]:
    """Normalization of `vectors` vectors of length `size` a token: RMSNorm saves one float32 statistic each, LayerNorm two."""
    statistics = 1 if config.norm_type == "rmsnorm" else 2
    return [
        SavedActivation(f"input of {name}", size * vectors, element, tp_sharded),
        SavedActivation(f"statistics of {name}", statistics * vectors, FP32, tp_sharded),
    ]


def _attention(config: ScratchGPTConfig, layer: int, workload: Workload) -> list[SavedActivation]:
    low, head_dim = workload.matmul_bytes, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    saved = []
    if config.qk_norm:
        element = FP32 if workload.device == "cuda" else low  # CUDA's autocast computes norms on float32 copies
        saved += _norm("q_norm", head_dim, element, heads, config, tp_sharded=True)
        saved += _norm("k_norm", head_dim, element, kv_heads, config, tp_sharded=True)
    if low == BF16 and _has_rope(config, layer):
        saved += [SavedActivation("cosines and sines", 2 * head_dim, BF16, per="position")]

    if materializes_attention_scores(config, workload):
        return saved + _eager_attention(config, workload)
    masked = config.layer_types[layer] == "sliding_attention" and workload.context_length >= config.sliding_window
    stored_kv_heads = heads if masked else kv_heads  # kernels that take a mask do not support grouped heads
    return [
        *saved,
        *([SavedActivation("mask", workload.context_length, low)] if masked else []),
        SavedActivation("queries", heads * head_dim, low, tp_sharded=True),
        SavedActivation("keys", stored_kv_heads * head_dim, low, tp_sharded=True),
        SavedActivation("values", stored_kv_heads * head_dim, low, tp_sharded=True),
        SavedActivation("log-sum-exp of the scores", heads, FP32, tp_sharded=True),
        SavedActivation("output, the input of o_proj", heads * head_dim, low, tp_sharded=True),
    ]


def _eager_attention(config: ScratchGPTConfig, workload: Workload) -> list[SavedActivation]:
    low, heads, head_dim = workload.matmul_bytes, config.num_attention_heads, config.head_dim
    scores = heads * workload.context_length
    # torch's own fallback computes everything in float32; `eager_attention_forward` only the softmax.
    only_softmax_in_float32 = config._attn_implementation == "eager" or _is_short_bf16(workload)
    inside = low if only_softmax_in_float32 else FP32
    saved = [
        SavedActivation("queries", heads * head_dim, inside, tp_sharded=True),
        SavedActivation("keys, one copy per query head", heads * head_dim, inside, tp_sharded=True),
        SavedActivation("softmax", scores, FP32, tp_sharded=True),
        *_dropout("mask of attn_dropout", scores, inside, config.attention_dropout, workload, tp_sharded=True),
        SavedActivation("values, one copy per query head", heads * head_dim, inside, tp_sharded=True),
        SavedActivation("input of o_proj", heads * head_dim, low, tp_sharded=True),
    ]
    if inside == BF16 or config.attention_dropout:
        saved += [SavedActivation("attention weights after rounding or dropout", scores, inside, tp_sharded=True)]
    return saved


def _is_short_bf16(workload: Workload) -> bool:
    return workload.device == "cpu" and workload.precision == "bf16" and workload.context_length <= MAX_SHORT_ATTENTION


def materializes_attention_scores(config: ScratchGPTConfig, workload: Workload) -> bool:
    """Whether attention computes all (context x context) scores at once instead of using a fused kernel."""
    if config._attn_implementation == "eager":
        return True
    if workload.device == "cpu":
        return bool(config.attention_dropout) or _is_short_bf16(workload)
    # In float32, CUDA has only torch's memory-efficient kernel, which does not support grouped heads (pytorch#181528).
    return workload.precision == "fp32" and config.num_key_value_heads < config.num_attention_heads


def _has_rope(config: ScratchGPTConfig, layer: int) -> bool:
    return config.position_embedding_type == "rope" and (
        config.no_rope_layers is None or bool(config.no_rope_layers[layer])
    )


def _mlp(config: ScratchGPTConfig, inner: int, low: int) -> list[SavedActivation]:
    """The MLP's saved tensors. ReLU's derivative needs its output only; other activations save their input as well."""
    before = (
        [] if config.hidden_act == "relu" else [SavedActivation("input of the activation", inner, low, tp_sharded=True)]
    )
    if config.mlp_type == "plain":
        return [*before, SavedActivation("input of down_proj", inner, low, tp_sharded=True)]
    return [
        *before,
        SavedActivation("output of the activation", inner, low, tp_sharded=True),
        SavedActivation("output of up_proj", inner, low, tp_sharded=True),
        SavedActivation("input of down_proj", inner, low, tp_sharded=True),
    ]


def _dropout(
    name: str, elements: float, element: int, probability: float, workload: Workload, tp_sharded: bool = False
) -> list[SavedActivation]:
    """The dropout mask: one byte per element on CUDA, a number of the input's dtype on CPU."""
    if not probability:
        return []
    return [SavedActivation(name, elements, 1 if workload.device == "cuda" else element, tp_sharded)]


def autocast_weight_copies(config: ScratchGPTConfig) -> SavedActivation:
    """The 16-bit copies of one block's weights that autocast makes and the backward pass reads."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    mlp = (3 if config.mlp_type == "gated" else 2) * config.intermediate_size
    return SavedActivation(
        "bf16 weights", config.hidden_size * (2 * queries + 2 * keys + mlp), BF16, tp_sharded=True, per="model"
    )


def saved_outside_blocks(config: ScratchGPTConfig, workload: Workload) -> list[SavedActivation]:
    """Saved tensors of the embeddings, the position encoding and the final norm."""
    saved = [SavedActivation("input_ids", 1, INT64)]
    if config.position_embedding_type == "learned":
        saved += [SavedActivation("position_ids", 1, INT64, per="position")]
    rope = any(_has_rope(config, layer) for layer in range(config.num_hidden_layers))
    if rope and workload.precision == "fp32" and not workload.checkpointing:
        saved += [SavedActivation("cosines and sines", 2 * config.head_dim, FP32, per="position")]
    saved += _dropout("mask of drop", config.hidden_size, FP32, config.embedding_dropout, workload)
    return [*saved, *_norm("ln_f", config.hidden_size, FP32, 1, config)]


def saved_by_loss(config: ScratchGPTConfig) -> list[SavedActivation]:
    """Gradients that the chunked loss computes in the forward pass and saves in place of the logits."""
    return [
        SavedActivation("gradient of the hidden states", config.hidden_size, FP32),
        SavedActivation("gradient of the head", config.padded_vocab_size * config.hidden_size, FP32, per="model"),
    ]


def saved_for_backward(
    config: ScratchGPTConfig, workload: Workload, weight_copies: bool = True
) -> list[SavedActivation]:
    """Every tensor saved between the forward and the backward pass, except those of the loss.

    Args:
        weight_copies: Count autocast's copies of the weights. There are none where weights are sharded, because they are
            gathered in 16 bits, one block at a time.
    """
    layers = range(config.num_hidden_layers)
    saved = saved_outside_blocks(config, workload)
    if workload.checkpointing:
        return [*saved, *(SavedActivation(f"input of block {layer}", config.hidden_size, FP32) for layer in layers)]
    for layer in layers:
        saved += saved_in_block(config, layer, workload)
        if weight_copies and workload.copies_weights:
            saved += [autocast_weight_copies(config)]
    return saved


def saved_bytes(saved: list[SavedActivation], workload: Workload) -> float:
    """Bytes of all of them on one device."""
    return sum(activation.size(workload) for activation in saved)


# ------------------------------------------------------------------------------------------------ temporary tensors


def temporary_bytes(config: ScratchGPTConfig, workload: Workload, weight_copies: bool = True) -> float:
    """Bytes beyond the saved tensors at the worst moment of the step: in the loss, or in the backward pass of a block.

    With activation checkpointing, the backward pass of a block also holds the block's recomputed activations, and
    autocast caches the copies of all weights until the end of the forward pass although nothing saves them.
    """
    in_loss, in_block = temporary_bytes_in_loss(config, workload), temporary_bytes_in_block(config, workload)
    if not workload.checkpointing:
        return max(in_loss, in_block)
    layers = range(config.num_hidden_layers)
    recomputed = max((saved_bytes(saved_in_block(config, layer, workload), workload) for layer in layers), default=0.0)
    copies = autocast_weight_copies(config).size(workload) if weight_copies and workload.copies_weights else 0.0
    return max(in_loss + copies * len(layers), in_block + recomputed + copies)


def temporary_bytes_in_loss(config: ScratchGPTConfig, workload: Workload) -> float:
    """Bytes that the loss holds at its worst moment, beyond the tensors it saves.

    For one chunk of tokens: the logits, which are overwritten by their gradient, and, for a few positions at a time, the
    float32 intermediates of the softmax.
    """
    vocabulary, hidden = config.padded_vocab_size, config.hidden_size
    if workload.tensor_parallel > 1:  # not chunked: all logits, and in float32 their softmax and its gradient
        return workload.tokens * config.vocab_size * (workload.matmul_bytes + 3 * FP32)
    on_cpu = workload.device == "cpu"
    chunk_tokens = min(CHUNK_SIZE_CPU if on_cpu else CHUNK_SIZE, workload.tokens)
    softmax_tokens = min(chunk_tokens, max(1, (SOFTMAX_SIZE_CPU if on_cpu else SOFTMAX_SIZE) // vocabulary))
    float32_per_logit = 2 if workload.uses_autocast else 1  # log-softmax, and under autocast the logits in float32
    if config.final_logit_softcapping:  # and the intermediates of the derivative of tanh
        float32_per_logit = 5
    # The head in 16 bits, and as many rows of a chunk's gradient of it as are computed at a time.
    gradient_rows = min(HEAD_ROWS_CPU, vocabulary) if on_cpu else vocabulary
    in_16_bits = (vocabulary + gradient_rows) * hidden * BF16 if workload.uses_autocast else 0
    logits = chunk_tokens * workload.matmul_bytes
    return vocabulary * (logits + softmax_tokens * float32_per_logit * FP32) + in_16_bits


def temporary_bytes_in_block(config: ScratchGPTConfig, workload: Workload) -> float:
    """Bytes of the gradients inside one block at the worst moment of its backward pass, beyond its saved tensors.

    In the MLP: the gradients of the activation's input and output, and of `up_proj`'s output. In attention that computes
    all scores: the gradients before and after the softmax, when the MLP's saved tensors are already freed. In both, two
    copies of the residual stream's gradient.
    """
    mlp_width = (3 if config.mlp_type == "gated" else 2) * config.intermediate_size
    in_mlp = workload.tokens * mlp_width * workload.matmul_bytes / workload.tensor_parallel
    in_attention = 0.0
    if materializes_attention_scores(config, workload):
        scores = 2 * config.num_attention_heads * workload.context_length * FP32
        saved_by_mlp = saved_bytes(_mlp(config, config.intermediate_size, workload.matmul_bytes), workload)
        in_attention = workload.tokens * scores / workload.tensor_parallel - saved_by_mlp
    return workload.tokens * 2 * config.hidden_size * FP32 + max(in_mlp, in_attention)
