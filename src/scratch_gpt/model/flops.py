"""Floating-point operations of a forward and backward pass."""

from dataclasses import dataclass

from scratch_gpt.model import ScratchGPTConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of a sequence of full length."""

    matrices: float
    """Forward and backward of the projections and of the head, tied or not: 6 for each of their weights."""
    attention: float
    """Forward and backward of queries x keys and weights x values."""
    recomputed: float
    """Forward operations that activation checkpointing recomputes."""

    @property
    def total(self) -> float:
        """Forward and backward, without recomputation: the numerator of MFU."""
        return self.matrices + self.attention


def flops_per_token(config: ScratchGPTConfig, context: int) -> Flops:
    """Count the FLOPs per token: 2 per multiply-add of a matrix product, 1 product forward and 2 backward; element-wise
    operations are not counted.

    This is what `torch.utils.flop_counter.FlopCounterMode` counts, the masked half of causal attention included, with two
    differences. It counts the scores that the backward pass of CUDA's fused attention recomputes (7 products instead of
    6), and 0 for the CPU's fused attention, for which it has no formula. And it does not know the in-place `addmm_` by
    which the chunked loss accumulates the head's gradient in float32, so it counts 2 per weight of the head less.

    A checkpointed block stops recomputing at the last tensor it saved, the input of `down_proj`, whose product is
    therefore not repeated (with dropout it is: the mask is saved after it).
    """
    queries = config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    attention_matrices = config.hidden_size * (queries + keys_and_values + queries)
    down_proj = config.hidden_size * config.intermediate_size
    block = attention_matrices + (3 if config.mlp_type == "gated" else 2) * down_proj
    head = config.padded_vocab_size * config.hidden_size
    scores = config.num_hidden_layers * context * queries  # multiply-adds of one of the two products of attention
    not_repeated = down_proj if not config.hidden_dropout else 0
    return Flops(
        matrices=6 * (config.num_hidden_layers * block + head),
        attention=6 * 2 * scores,
        recomputed=2 * config.num_hidden_layers * (block - not_repeated) + 2 * 2 * scores,
    )
