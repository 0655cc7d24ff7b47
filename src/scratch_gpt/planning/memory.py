"""Memory of one device in one training step, for a layout: weights, gradients, optimizer state, activations, ...

`parameters.py` counts what is sharded, `activations.py` has the formulas of the forward and backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.planning.activations import (
    FP32,
    Workload,
    saved_by_loss,
    saved_bytes,
    saved_for_backward,
    temporary_bytes,
)
from scratch_gpt.planning.layouts import Layout
from scratch_gpt.planning.parameters import ParameterCounts, optimizer_state_bytes

GB = 1e9
SEARCH_LIMIT = 2**20
"""Largest device batch that `largest_fitting_batch` considers, in sequences."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Tensors that the blocks save for the backward pass; in bf16 and fp16 including autocast's copies of the weights."""
    loss: float
    """Gradients that the chunked loss computes in the forward pass."""
    temporary: float
    """Largest of: a chunk of logits, the gradients inside one block, a recomputed block."""
    communication: float
    """Gradient buckets, and weights gathered from the other devices."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def estimate_memory(
    config: ScratchGPTConfig,
    parameters: ParameterCounts,
    layout: Layout,
    workload: Workload,
    optimizer: str = "adamw",
) -> MemoryEstimate:
    """Estimate a step with gradient accumulation, where gradients of earlier micro-batches exist during the next one.

    Weights, gradients and AdamW's moments are float32. DeepSpeed stages 1 and 2, where every rank has all the weights,
    also keep a float32 copy of the shard that the rank updates.
    """
    workload = replace(workload, tensor_parallel=layout.tensor_parallel)
    unsharded = parameters.local_elements(tensor_parallel=layout.tensor_parallel)

    def local_elements(shards: int) -> float:
        if layout.deepspeed:  # all parameters in one flat buffer, cut into equal shards
            return unsharded / shards
        return parameters.local_elements(shards, layout.tensor_parallel)

    if layout.deepspeed:
        optimizer_bytes = optimizer_state_bytes(parameters, optimizer) / layout.optimizer_shards
        if not layout.gathers_weights:
            optimizer_bytes += FP32 * local_elements(layout.optimizer_shards)
    else:
        shards, tensor_parallel = layout.optimizer_shards, layout.tensor_parallel
        optimizer_bytes = optimizer_state_bytes(parameters, optimizer, shards, tensor_parallel)
    weight_copies = not layout.gathers_weights
    # Under tensor parallelism the head is split and the loss is not chunked: its logits count as temporary.
    saved_loss = saved_by_loss(config) if layout.tensor_parallel == 1 else []
    return MemoryEstimate(
        weights=FP32 * local_elements(layout.weight_shards),
        gradients=FP32 * local_elements(layout.gradient_shards),
        optimizer=optimizer_bytes,
        activations=saved_bytes(saved_for_backward(config, workload, weight_copies), workload),
        loss=saved_bytes(saved_loss, workload),
        temporary=temporary_bytes(config, workload, weight_copies),
        communication=_communication_bytes(layout, parameters, workload, unsharded),
    )


def _communication_bytes(layout: Layout, parameters: ParameterCounts, workload: Workload, unsharded: float) -> float:
    """Bytes of communication buffers and gathered weights.

    ddp: buckets for all gradients (`gradient_as_bucket_view` would save them). fsdp2: embeddings and head, gathered in
    float32 for the whole step; two blocks of weights, one in use and one prefetched; and the unsharded gradients of one
    block, which are cast to float32 before they are reduced. DeepSpeed: a gradient bucket of one block's size, as
    `distributed/deepspeed.py` sets it; zero3 has two buckets, and gathers as fsdp2 does, but in float32.
    """
    if layout.deepspeed:
        outside_blocks = float(parameters.embeddings + parameters.head)
        block = float(parameters.largest_block)
        return FP32 * (outside_blocks + 2 * block + 2 * block if layout.gathers_weights else block)
    if layout.gathers_weights:
        outside_blocks = (parameters.embeddings + parameters.head) / layout.tensor_parallel
        block = parameters.largest_block / layout.tensor_parallel
        low = workload.matmul_bytes
        return FP32 * outside_blocks + low * 2 * block + (FP32 + low) * block
    return FP32 * unsharded if layout.dp_size > 1 else 0.0


def largest_fitting_batch(needed_bytes: Callable[[int], float], available: float) -> int:
    """The largest batch of sequences for which `needed_bytes(batch)` is available; 0 if one sequence does not fit."""
    low, high = 0, 1
    while high <= SEARCH_LIMIT and needed_bytes(high) <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed_bytes(middle) <= available else (low, middle)
    return low
