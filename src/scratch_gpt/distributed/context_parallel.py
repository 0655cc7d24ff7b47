"""Context parallelism: the columns of each row divided over processes, for rows too long for one device.

All that a block does, it does to each token by itself, but for attention. There every process gathers the keys and values
of whole rows, which are few where heads share them, and lets its own queries attend to those before them (as Llama 3 did:
Grattafiori et al., 2024, arXiv:2407.21783). A row is cut into twice as many pieces as there are processes, of which each
has one from the front and its mirror image from the back: so all have equally much to attend to.

The model is not changed. A :class:`Part` goes where its masks would, through the blocks to the attention function that is
registered here. Whoever has losses of his own that ask for whole rows lets :func:`apply_context_parallel` do it all: the embeddings
and blocks have columns, what comes out of them is put together.
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
FOLLOWS_THE_LONGEST = ("dynamic", "longrope")
"""Rotary positions whose angles change with the last position that a process sees."""


@dataclass(frozen=True)
class Part:
    """This process's part of the rows of a batch, for the layers of one type."""

    group: dist.ProcessGroup
    ends: tuple[int, int]
    """Behind the last column of each of its two pieces."""
    masks: tuple[torch.Tensor, torch.Tensor]
    """Of each piece: which of the columns before its end are seen, (batch or 1, 1, columns of the piece, end)."""


def check_context_length(config: Any, context_length: int, size: int) -> None:
    """Raises a UserError if rows of ``context_length`` cannot be divided over ``size`` processes."""
    if size == 1:
        return
    if context_length % (2 * size):
        raise UserError(
            f"context parallelism over {size} processes cuts rows into {2 * size} pieces, and the context of "
            f"{context_length} does not divide: give another --training.context_length"
        )
    kind = config.rope_parameters["rope_type"] if config.position_embedding_type == "rope" else "default"
    if kind in FOLLOWS_THE_LONGEST:
        raise UserError(
            f"context parallelism: the angles of rope_type {kind} follow from the last position of a row, which not every "
            "process has: take another rope_type, or cp_size 1"
        )


def local_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """The columns of a row of ``length`` that process ``rank`` of ``size`` has, in order, (length / size,)."""
    pieces = torch.arange(length).view(2 * size, -1)
    return pieces[[rank, 2 * size - 1 - rank]].flatten()


def shard_batch(batch: Batch, config: Any, group: dist.ProcessGroup) -> tuple[Batch, dict[str, Part]]:
    """Of a batch of whole rows, which all processes of ``group`` have: this one's columns; by type of layer, its part."""
    length, device = batch.input_ids.shape[1], batch.input_ids.device
    columns = local_positions(length, group.rank(), group.size()).to(device)
    documents, positions = None, torch.arange(length, device=device).unsqueeze(0)
    if batch.position_ids is not None:
        positions = batch.position_ids
        documents = documents_of(positions)
    own = Batch(batch.input_ids[:, columns], batch.targets[:, columns], positions[:, columns])
    return own, own_parts(config, length, documents, group, device)


def documents_of(positions: torch.Tensor) -> torch.Tensor:
    """The number of each token's document in its row, from ``positions`` (batch, seq) that begin anew with each."""
    return (positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(1)


def own_parts(
    config: Any, length: int, documents: torch.Tensor | None, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Part]:
    """By type of layer, this process's part of rows of ``length``, in which only tokens of the same of ``documents``
    (batch, length) see each other.
    """
    rank, size = group.rank(), group.size()
    piece = length // (2 * size)
    pieces = [range(number * piece, (number + 1) * piece) for number in (rank, 2 * size - 1 - rank)]
    parts = {}
    for kind in set(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        first, second = (_mask(columns, documents, window, device) for columns in pieces)
        parts[kind] = Part(group, (pieces[0].stop, pieces[1].stop), (first, second))
    return parts


def _mask(queries: range, documents: torch.Tensor | None, window: int | None, device: torch.device) -> torch.Tensor:
    if documents is None and window is None:  # has kernels of its own, which need no memory for it
        return causal_lower_right(len(queries), queries.stop)
    query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    key = torch.arange(queries.stop, device=device)
    seen = (key <= query).unsqueeze(0)
    if window is not None:
        seen = seen & (key > query - window)
    if documents is not None:
        seen = seen & (documents[:, queries.start : queries.stop, None] == documents[:, None, : queries.stop])
    return seen.unsqueeze(1)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Part | torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of transformers, over whole rows or this process's :class:`Part` of them: (batch, own seq, heads, head_dim)."""
    if not isinstance(attention_mask, Part):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = gather_columns(torch.stack([key, value]), attention_mask.group)  # (batch, kv_heads, seq, head_dim)
    outputs = [
        sdpa_attention_forward(module, piece, key[:, :, :end], value[:, :, :end], mask, **kwargs)[0]
        for piece, end, mask in zip(query.chunk(2, dim=2), attention_mask.ends, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def gather_columns(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Each process's columns (..., own seq, head_dim) to all in the order of the row (..., seq, head_dim)."""
    front, back = _AllGather.apply(own, group).chunk(2, dim=-2)  # each (size, ..., piece, head_dim)
    return torch.cat([*front, *back.flip(0)], dim=-2)


class _AllGather(torch.autograd.Function):
    """(...) of every process to (size, ...); the gradient is summed over processes, in float32."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        return gathered.view(group.size(), *own.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = torch.empty(grad.shape[1:], dtype=torch.float32, device=grad.device)
        dist.reduce_scatter_tensor(summed, grad.float().flatten(0, 1).contiguous(), group=ctx.group)
        return summed.to(grad.dtype), None


def apply_context_parallel(backbone: Any, group: dist.ProcessGroup) -> None:
    """Let ``backbone``, which all processes of ``group`` give the same rows of any length, compute its own columns of
    them and give back whole ones; with a cache, as it draws, it computes whole ones.

    The processes go on with the same hidden states and come to the same loss, so that all gradients, of the backbone and
    of what follows it, are right where they are averaged over them.
    """
    length = 0  # of the rows at hand, 0 where they are not divided

    def divide(backbone: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        nonlocal length
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        given = {**keywords, **dict(zip(names, arguments, strict=False))}
        ids, mask, positions = (given.get(name) for name in names[:3])
        length = 0
        if given.get("past_key_values") is not None:
            return None
        assert ids is not None and (mask is None or mask.ndim == 2)
        length = ids.shape[1]
        documents = None
        if mask is not None and (mask.long().diff(dim=1) > 0).any():  # padding that no causal mask hides
            documents = mask.long()
        elif mask is None and positions is not None:
            documents = documents_of(positions)
        if positions is None:
            positions = backbone._default_position_ids(mask, ids, None)
        more = -length % (2 * group.size())
        ids, positions = F.pad(ids, (0, more)), F.pad(positions, (0, more))
        documents = None if documents is None else F.pad(documents, (0, more), value=-1)
        columns = local_positions(length + more, group.rank(), group.size()).to(ids.device)
        own = {"input_ids": ids[:, columns], "position_ids": positions[:, columns], "use_cache": False}
        parts = own_parts(backbone.config, length + more, documents, group, ids.device)
        return (), {**given, **own, "attention_mask": parts}

    def put_together(backbone: Any, arguments: tuple[Any, ...], output: Any) -> None:
        if length:
            output["last_hidden_state"] = _Whole.apply(output.last_hidden_state, group)[:, :length]

    backbone.register_forward_pre_hook(divide, with_kwargs=True)
    backbone.register_forward_hook(put_together)


class _Whole(torch.autograd.Function):
    """Own columns (batch, own seq, hidden) to whole rows (batch, seq, hidden), whose gradient all processes have alike."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return gather_columns(own, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        rank, size = ctx.group.rank(), ctx.group.size()
        columns = local_positions(grad.shape[1], rank, size).to(grad.device)
        return grad[:, columns] * size, None  # the average over processes is to be the sum over columns


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
