"""Context parallelism: shard the positions of each sequence over ranks, for sequences too long for one device.

Only attention mixes tokens; everything else in a block is per token. For attention, each rank gathers the keys and values
of the full sequence, which are small under grouped-query attention, and its own queries attend to those before them (Llama
3: Grattafiori et al., 2024, arXiv:2407.21783). A sequence is cut into twice as many chunks as there are ranks. Each rank
has one chunk from the front and its mirror image from the back, so that causal attention costs all ranks the same.

The model is not changed: a :class:`ContextShard` is passed in place of the attention mask, through the blocks to the
attention function registered here. A trainer whose loss needs full sequences calls :func:`apply_context_parallel`, which
shards what enters the backbone and gathers what leaves it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scratch_gpt.data.batches import Batch
from scratch_gpt.errors import UserError

ATTENTION = "scratch_gpt_context_parallel"
"""The name of this module's attention function, for `set_attn_implementation`."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the largest position that a rank sees."""


@dataclass(frozen=True)
class ContextShard:
    """Group, ends and masks of this rank's two chunks of each sequence, for the layers of one type."""

    group: dist.ProcessGroup
    ends: tuple[int, int]
    """For each chunk, the position after its last one."""
    masks: tuple[torch.Tensor, torch.Tensor]
    """For each chunk, which positions before its end are visible: (batch or 1, 1, chunk length, end)."""


def check_context_length(config: Any, context_length: int, cp_size: int) -> None:
    """Raise a UserError if sequences of ``context_length`` cannot be sharded over ``cp_size`` ranks."""
    if cp_size == 1:
        return
    if context_length % (2 * cp_size):
        raise UserError(
            f"context parallelism over {cp_size} processes cuts sequences into {2 * cp_size} chunks, which does not "
            f"divide the context length of {context_length}: give another --training.context_length"
        )
    rope_type = config.rope_parameters["rope_type"] if config.position_embedding_type == "rope" else "default"
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise UserError(
            f"context parallelism: the frequencies of rope_type {rope_type} depend on the last position of a sequence, "
            "which not every process has: take another rope_type, or cp_size 1"
        )


def local_positions(length: int, rank: int, cp_size: int) -> torch.Tensor:
    """Return the positions of ``rank`` in a sequence of ``length``, in order: (length / cp_size,)."""
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return chunks[list(_chunk_numbers(rank, cp_size))].flatten()


def _chunk_numbers(rank: int, cp_size: int) -> tuple[int, int]:
    return rank, 2 * cp_size - 1 - rank


def shard_batch(batch: Batch, config: Any, group: dist.ProcessGroup) -> tuple[Batch, dict[str, ContextShard]]:
    """Return this rank's positions of ``batch``, which all ranks of ``group`` have in full, and its attention masks.

    Returns:
        The batch of (batch, seq / cp_size) tokens, and a :class:`ContextShard` for each layer type.
    """
    length, device = batch.input_ids.shape[1], batch.input_ids.device
    index = local_positions(length, group.rank(), group.size()).to(device)
    documents, position_ids = None, torch.arange(length, device=device).unsqueeze(0)
    if batch.position_ids is not None:
        position_ids = batch.position_ids
        documents = document_ids(position_ids)
    local = Batch(batch.input_ids[:, index], batch.targets[:, index], position_ids[:, index])
    return local, build_context_shards(config, length, documents, group, device)


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents packed into each sequence, (batch, seq), from positions that restart with each document."""
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1).cumsum(1)


def build_context_shards(
    config: Any, length: int, documents: torch.Tensor | None, group: dist.ProcessGroup, device: torch.device
) -> dict[str, ContextShard]:
    """Return this rank's :class:`ContextShard` of sequences of ``length`` for each layer type of the model.

    ``documents`` (batch, length): tokens attend only within the same number. Default: no restriction.
    """
    chunk_length = length // (2 * group.size())
    chunks = [
        range(number * chunk_length, (number + 1) * chunk_length)
        for number in _chunk_numbers(group.rank(), group.size())
    ]
    shards = {}
    for layer_type in set(config.layer_types):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        first, second = (_mask(chunk, documents, window, device) for chunk in chunks)
        shards[layer_type] = ContextShard(group, (chunks[0].stop, chunks[1].stop), (first, second))
    return shards


def _mask(queries: range, documents: torch.Tensor | None, window: int | None, device: torch.device) -> torch.Tensor:
    if documents is None and window is None:  # torch has kernels for it that need no mask in memory
        return causal_lower_right(len(queries), queries.stop)
    query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    key = torch.arange(queries.stop, device=device)
    visible = (key <= query).unsqueeze(0)
    if window is not None:
        visible = visible & (key > query - window)
    if documents is not None:
        visible = visible & (documents[:, queries.start : queries.stop, None] == documents[:, None, : queries.stop])
    return visible.unsqueeze(1)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ContextShard | torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' `sdpa` attention, over gathered keys and values if the mask is a :class:`ContextShard`.

    Query, key and value are (batch, heads, local seq, head_dim), the output is (batch, local seq, heads, head_dim).
    """
    if not isinstance(attention_mask, ContextShard):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = gather_sequence(torch.stack([key, value]), attention_mask.group)  # (batch, kv_heads, seq, head_dim)
    outputs = [
        sdpa_attention_forward(module, chunk, key[:, :, :end], value[:, :, :end], mask, **kwargs)[0]
        for chunk, end, mask in zip(query.chunk(2, dim=2), attention_mask.ends, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def gather_sequence(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather (..., local seq, features) of all ranks into (..., seq, features), in the order of the sequence."""
    front, back = _AllGather.apply(local, group).chunk(2, dim=-2)  # each (cp_size, ..., chunk length, features)
    return torch.cat([*front, *back.flip(0)], dim=-2)


class _AllGather(torch.autograd.Function):
    """Gather (...) of all ranks into (cp_size, ...); the gradient is reduce-scattered in float32."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered.view(group.size(), *local.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = torch.empty(grad.shape[1:], dtype=torch.float32, device=grad.device)
        dist.reduce_scatter_tensor(summed, grad.float().flatten(0, 1).contiguous(), group=ctx.group)
        return summed.to(grad.dtype), None


class _GatherSequence(torch.autograd.Function):
    """Gather hidden states (batch, local seq, hidden) into (batch, seq, hidden), whose gradient is equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather_sequence(local, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        rank, size = ctx.group.rank(), ctx.group.size()
        index = local_positions(grad.shape[1], rank, size).to(grad.device)
        return grad[:, index] * size, None  # gradients are averaged over ranks later, and should be summed


def apply_context_parallel(backbone: Any, group: dist.ProcessGroup) -> None:
    """Make ``backbone`` shard its inputs over ``group``, whose ranks all pass the same sequences, and gather its outputs.

    Sequences may have any length. With a cache, as in generation, nothing is sharded. All ranks continue with the same
    hidden states and compute the same loss, so averaging all gradients over the ranks, those of layers after the backbone
    included, gives the gradients of one process.
    """
    length = 0  # of the sequences of the current call; 0 if they are not sharded

    def shard_inputs(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal length
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        inputs = {**kwargs, **dict(zip(names, args, strict=False))}
        input_ids, mask, position_ids = (inputs.get(name) for name in names[:3])
        length = 0
        if inputs.get("past_key_values") is not None:
            return None
        assert input_ids is not None and (mask is None or mask.ndim == 2)
        length = input_ids.shape[1]
        documents = None
        if mask is not None and (mask.long().diff(dim=1) > 0).any():  # left padding, which causal masks do not hide
            documents = mask.long()
        elif mask is None and position_ids is not None:
            documents = document_ids(position_ids)
        if position_ids is None:
            position_ids = backbone._default_position_ids(mask, input_ids, None)
        padding = -length % (2 * group.size())
        input_ids, position_ids = F.pad(input_ids, (0, padding)), F.pad(position_ids, (0, padding))
        documents = None if documents is None else F.pad(documents, (0, padding), value=-1)
        index = local_positions(length + padding, group.rank(), group.size()).to(input_ids.device)
        local = {"input_ids": input_ids[:, index], "position_ids": position_ids[:, index], "use_cache": False}
        shards = build_context_shards(backbone.config, length + padding, documents, group, input_ids.device)
        return (), {**inputs, **local, "attention_mask": shards}

    def gather_outputs(backbone: Any, args: tuple[Any, ...], output: Any) -> None:
        if length:
            output["last_hidden_state"] = _GatherSequence.apply(output.last_hidden_state, group)[:, :length]

    backbone.register_forward_pre_hook(shard_inputs, with_kwargs=True)
    backbone.register_forward_hook(gather_outputs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
