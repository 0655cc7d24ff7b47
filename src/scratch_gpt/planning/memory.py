"""What one training step computes and holds, derived from the code of the model (nothing here is fitted).

Floating-point operations as torch's FLOP counter counts them, and memory: the tensors that the forward pass saves for
the backward pass, written down as a table with an entry for each line of `modeling_scratch_gpt.py` that saves one, and
what comes and goes in between. The tests hold each against measured bytes.

It is this project's training that is described: float32 weights, gradients and optimizer state, and but for fp32 an
autocast that computes the matrix products in bfloat16 (fp16: float16; fp8: the blocks' in float8, of which nothing is
kept) and leaves the residual stream in float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
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
    """One forward and backward pass of one device."""

    rows: int
    context: int
    precision: Precision = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"
    checkpointing: bool = False
    """Activation checkpointing of every block: its input is kept, the rest is computed again in the backward pass."""
    tensor_parallel: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    @property
    def matmul_bytes(self) -> int:
        """Bytes of one element in matrix products."""
        return BF16 if self.autocast else FP32

    @property
    def autocast(self) -> bool:
        return self.precision != "fp32"

    @property
    def copies_weights(self) -> bool:
        """Whether the backward pass reads 16-bit copies of the weights; float8 layers keep the weights themselves."""
        return self.precision in ("bf16", "fp16")


# ------------------------------------------------------------------------------------------------ parameters


@dataclass(frozen=True)
class Matrix:
    """A parameter; a vector is a matrix of one column."""

    name: str
    rows: int
    columns: int
    split: Literal["rows", "columns", "nothing"]
    """What tensor parallelism divides."""

    def held(self, shards: int, tensor_parallel: int) -> int:
        """Elements on the device that has most: each has whole rows, all those that it computes with being sharded."""
        rows = -(-self.rows // (tensor_parallel if self.split == "rows" else 1))
        columns = self.columns // (tensor_parallel if self.split == "columns" else 1)
        return -(-rows // shards) * columns


@dataclass(frozen=True)
class Parameters:
    """Exact numbers of parameters; a tied head is counted once, among the embeddings."""

    total: int
    embeddings: int
    head: int
    """Of a head that is not tied."""
    largest_block: int
    all: tuple[Matrix, ...]

    def held(self, shards: int = 1, tensor_parallel: int = 1) -> int:
        """Elements on the device that has most, each parameter being divided by itself (FSDP2: by rows)."""
        return sum(one.held(shards, tensor_parallel) for one in self.all)


def count(config: ScratchGPTConfig) -> Parameters:
    """Counted on the model itself, built without memory."""
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def number(*parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    return Parameters(
        total=sum(sizes.values()),
        embeddings=number(".wte.", ".wpe."),
        head=number("lm_head"),
        largest_block=max((sum(p.numel() for p in block.parameters()) for block in model.transformer.h), default=0),
        all=tuple(
            Matrix(name, len(parameter), parameter.numel() // len(parameter), _split(name))
            for name, parameter in model.named_parameters()
        ),
    )


def _split(name: str) -> Literal["rows", "columns", "nothing"]:
    """As the model's plan for tensor parallelism has it: matrices that write to the residual stream by columns."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return "columns"
    if name.endswith(
        (
            *(f"{each}_proj.{part}" for each in ("q", "k", "v", "gate", "up") for part in ("weight", "bias")),
            "wte.weight",
            "lm_head.weight",
            "lm_head.bias",
        )
    ):
        return "rows"
    return "nothing"


def optimizer_bytes(
    parameters: Parameters, optimizer: str = "adamw", shards: int = 1, tensor_parallel: int = 1
) -> float:
    """AdamW: two moments for each parameter. Muon: one momentum for the projections, AdamW for the rest."""
    moments = sum(
        (1 if optimizer == "muon" and one.name.endswith("_proj.weight") else 2) * one.held(shards, tensor_parallel)
        for one in parameters.all
    )
    return FP32 * moments


# ------------------------------------------------------------------------------------------------ FLOPs


# ------------------------------------------------------------------------------------------------ saved tensors


@dataclass(frozen=True)
class SavedActivation:
    """A tensor that the forward pass keeps for the backward pass."""

    what: str
    elements: float
    """Per token, or as `per` says."""
    bytes: int
    split: bool = False
    """Whether each of the devices of a tensor-parallel group holds its share of the elements only."""
    per: Literal["token", "position", "model"] = "token"
    """token: grows with batch and context; position: one row, whatever the batch; model: neither."""

    def size(self, load: Workload) -> float:
        times = {"token": load.tokens, "position": load.context, "model": 1}[self.per]
        return self.elements * self.bytes * times / (load.tensor_parallel if self.split else 1)


def saved_in_block(config: ScratchGPTConfig, layer: int, load: Workload) -> list[SavedActivation]:
    """What one block saves, in the order of its forward pass. The weights themselves are not listed."""
    low = load.matmul_bytes
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        *_norm("ln_1", hidden, FP32, 1, config),
        # Each projection under autocast makes a bfloat16 copy of its own; in float32 they share the norm's output.
        SavedActivation("input of q_proj, k_proj, v_proj", hidden * _copies(3, load), low),
        *_attention(config, layer, load),
        *_dropout("mask of attn.resid_dropout", hidden, low, config.hidden_dropout, load),
        *_norm("ln_2", hidden, FP32, 1, config),
        SavedActivation(
            "input of gate_proj, up_proj", hidden * _copies(2 if config.mlp_type == "gated" else 1, load), low
        ),
        *_mlp(config, inner, low),
        *_dropout("mask of mlp.resid_dropout", hidden, low, config.hidden_dropout, load),
    ]


def _copies(readers: int, load: Workload) -> int:
    return readers if load.autocast else 1


def _norm(
    name: str, size: int, element: int, vectors: int, config: ScratchGPTConfig, split: bool = False
) -> list[SavedActivation]:
    """`vectors` normalised vectors of length `size`: RMSNorm keeps one float32 statistic of each, LayerNorm two."""
    statistics = 1 if config.norm_type == "rmsnorm" else 2
    return [
        SavedActivation(f"input of {name}", size * vectors, element, split),
        SavedActivation(f"statistics of {name}", statistics * vectors, FP32, split),
    ]


def _attention(config: ScratchGPTConfig, layer: int, load: Workload) -> list[SavedActivation]:
    low, heads, kv_heads, head_dim = (
        load.matmul_bytes,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    saved = []
    if config.qk_norm:
        element = FP32 if load.device == "cuda" else low  # CUDA's autocast computes norms on float32 copies
        saved += _norm("q_norm", head_dim, element, heads, config, split=True)
        saved += _norm("k_norm", head_dim, element, kv_heads, config, split=True)
    if low == BF16 and _has_rope(config, layer):
        saved += [SavedActivation("cosines and sines", 2 * head_dim, BF16, per="position")]

    if attention_is_materialised(config, load):
        return saved + _materialised_attention(config, load)
    masked = config.layer_types[layer] == "sliding_attention" and load.context >= config.sliding_window
    copies = heads if masked else kv_heads  # kernels with a mask take no groups of heads
    return [
        *saved,
        *([SavedActivation("mask", load.context, low)] if masked else []),
        SavedActivation("queries", heads * head_dim, low, split=True),
        SavedActivation("keys", copies * head_dim, low, split=True),
        SavedActivation("values", copies * head_dim, low, split=True),
        SavedActivation("logarithm of the softmax's denominator", heads, FP32, split=True),
        SavedActivation("output, the input of o_proj", heads * head_dim, low, split=True),
    ]


def _materialised_attention(config: ScratchGPTConfig, load: Workload) -> list[SavedActivation]:
    low, heads, head_dim, scores = (
        load.matmul_bytes,
        config.num_attention_heads,
        config.head_dim,
        config.num_attention_heads * load.context,
    )
    # torch's own fallback computes in float32; `eager_attention_forward` only the softmax.
    ours = config._attn_implementation == "eager" or _is_short_bf16(load)
    inside = low if ours else FP32
    saved = [
        SavedActivation("queries", heads * head_dim, inside, split=True),
        SavedActivation("keys, one copy per query head", heads * head_dim, inside, split=True),
        SavedActivation("softmax", scores, FP32, split=True),
        *_dropout("mask of attn_dropout", scores, inside, config.attention_dropout, load, split=True),
        SavedActivation("values, one copy per query head", heads * head_dim, inside, split=True),
        SavedActivation("input of o_proj", heads * head_dim, low, split=True),
    ]
    if inside == BF16 or config.attention_dropout:
        saved += [SavedActivation("attention weights, rounded or dropped out", scores, inside, split=True)]
    return saved


def _is_short_bf16(load: Workload) -> bool:
    return load.device == "cpu" and load.precision == "bf16" and load.context <= MAX_SHORT_ATTENTION


def attention_is_materialised(config: ScratchGPTConfig, load: Workload) -> bool:
    """Whether all (context x context) scores are held at once, and no fused kernel used."""
    if config._attn_implementation == "eager":
        return True
    if load.device == "cpu":
        return bool(config.attention_dropout) or _is_short_bf16(load)
    # In float32 CUDA has torch's memory-efficient kernel only, which takes no groups of heads (pytorch#181528).
    return load.precision == "fp32" and config.num_key_value_heads < config.num_attention_heads


def _has_rope(config: ScratchGPTConfig, layer: int) -> bool:
    return config.position_embedding_type == "rope" and (
        config.no_rope_layers is None or bool(config.no_rope_layers[layer])
    )


def _mlp(config: ScratchGPTConfig, inner: int, low: int) -> list[SavedActivation]:
    """ReLU's derivative is told from its result; other activations keep their input, too."""
    before = [] if config.hidden_act == "relu" else [SavedActivation("input of the activation", inner, low, split=True)]
    if config.mlp_type == "plain":
        return [*before, SavedActivation("input of down_proj", inner, low, split=True)]
    return [
        *before,
        SavedActivation("result of the activation", inner, low, split=True),
        SavedActivation("output of up_proj", inner, low, split=True),
        SavedActivation("input of down_proj", inner, low, split=True),
    ]


def _dropout(
    what: str, elements: float, element: int, probability: float, load: Workload, split: bool = False
) -> list[SavedActivation]:
    """CUDA keeps a boolean per element, the CPU a number."""
    return [SavedActivation(what, elements, 1 if load.device == "cuda" else element, split)] if probability else []


def copied_weights(config: ScratchGPTConfig) -> SavedActivation:
    """The bfloat16 copies of a block's weights that autocast makes and the backward pass reads."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    mlp = (3 if config.mlp_type == "gated" else 2) * config.intermediate_size
    return SavedActivation(
        "bf16 weights", config.hidden_size * (2 * queries + 2 * keys + mlp), BF16, split=True, per="model"
    )


def saved_outside_blocks(config: ScratchGPTConfig, load: Workload) -> list[SavedActivation]:
    """Embeddings, positions and the final norm."""
    saved = [SavedActivation("input_ids", 1, INT64)]
    if config.position_embedding_type == "learned":
        saved += [SavedActivation("position_ids", 1, INT64, per="position")]
    rope = any(_has_rope(config, layer) for layer in range(config.num_hidden_layers))
    if rope and load.precision == "fp32" and not load.checkpointing:
        saved += [SavedActivation("cosines and sines", 2 * config.head_dim, FP32, per="position")]
    saved += _dropout("mask of drop", config.hidden_size, FP32, config.embedding_dropout, load)
    return [*saved, *_norm("ln_f", config.hidden_size, FP32, 1, config)]


def saved_by_loss(config: ScratchGPTConfig) -> list[SavedActivation]:
    """The chunked loss computes its gradients in the forward pass and keeps them, not the logits."""
    return [
        SavedActivation("gradient of the hidden states", config.hidden_size, FP32),
        SavedActivation("gradient of the head", config.padded_vocab_size * config.hidden_size, FP32, per="model"),
    ]


def saved_for_backward(config: ScratchGPTConfig, load: Workload, copies: bool = True) -> list[SavedActivation]:
    """All that lies between the forward and the backward pass, but for what the loss saves.

    `copies`: autocast's copies of the weights count. Where the weights are sharded, and gathered in bfloat16 for one
    block at a time, there are none.
    """
    layers = range(config.num_hidden_layers)
    saved = saved_outside_blocks(config, load)
    if load.checkpointing:
        return [*saved, *(SavedActivation(f"input of block {layer}", config.hidden_size, FP32) for layer in layers)]
    for layer in layers:
        saved += saved_in_block(config, layer, load)
        if copies and load.copies_weights:
            saved += [copied_weights(config)]
    return saved


def bytes_of(saved: list[SavedActivation], load: Workload) -> float:
    return sum(one.size(load) for one in saved)


# ------------------------------------------------------------------------------------------------ what comes and goes


def temporary(config: ScratchGPTConfig, load: Workload, copies: bool = True) -> float:
    """Bytes beside what is saved, at the worst moment of the step: in the loss, or in the backward pass of a block.

    With activation checkpointing a block is there once more while its gradients are computed; autocast keeps the copies
    of all weights to the end of the forward pass, though nothing saved them.
    """
    in_loss, in_block = temporary_in_loss(config, load), temporary_in_block(config, load)
    if not load.checkpointing:
        return max(in_loss, in_block)
    layers = range(config.num_hidden_layers)
    block = max((bytes_of(saved_in_block(config, layer, load), load) for layer in layers), default=0.0)
    copied = copied_weights(config).size(load) if copies and load.copies_weights else 0.0
    return max(in_loss + copied * len(layers), in_block + block + copied)


def temporary_in_loss(config: ScratchGPTConfig, load: Workload) -> float:
    """Bytes that the loss holds at its worst moment, beside what it saves.

    Of a chunk it holds the logits, which become their gradient, and in float32 what the softmax of some of its rows
    takes.
    """
    vocabulary, hidden = config.padded_vocab_size, config.hidden_size
    if load.tensor_parallel > 1:  # a split head: all logits, in float32 their softmax and its gradient
        return load.tokens * config.vocab_size * (load.matmul_bytes + 3 * FP32)
    on_cpu = load.device == "cpu"
    chunk = min(CHUNK_SIZE_CPU if on_cpu else CHUNK_SIZE, load.tokens)
    piece = min(chunk, max(1, (SOFTMAX_SIZE_CPU if on_cpu else SOFTMAX_SIZE) // vocabulary))
    floats = 2 if load.autocast else 1  # log-softmax; the logits themselves
    if config.final_logit_softcapping:  # and what the derivative of tanh takes
        floats = 5
    rows = min(HEAD_ROWS_CPU, vocabulary) if on_cpu else vocabulary
    # The head, and as many rows of its gradient of a chunk.
    in_16_bits = (vocabulary + rows) * hidden * BF16 if load.autocast else 0
    return vocabulary * (chunk * load.matmul_bytes + piece * floats * FP32) + in_16_bits


def temporary_in_block(config: ScratchGPTConfig, load: Workload) -> float:
    """Bytes of the gradients inside one block at the worst moment of its backward pass, beside what it saved.

    In the MLP they are those of the activation's input and result (and of `up_proj`'s output). In attention that keeps
    its scores they are those before and after the softmax; by then what the MLP saved is gone. With them the gradient of
    the residual stream, twice for a moment.
    """
    inner = (3 if config.mlp_type == "gated" else 2) * config.intermediate_size * load.matmul_bytes
    in_mlp = load.tokens * inner / load.tensor_parallel
    in_attention = 0.0
    if attention_is_materialised(config, load):
        scores = 2 * config.num_attention_heads * load.context * FP32
        saved_by_mlp = bytes_of(_mlp(config, config.intermediate_size, load.matmul_bytes), load)
        in_attention = load.tokens * scores / load.tensor_parallel - saved_by_mlp
    return load.tokens * 2 * config.hidden_size * FP32 + max(in_mlp, in_attention)
