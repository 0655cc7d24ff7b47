"""The shard of a tensor on one rank: the full tensor, torch's DTensor, or a parameter partitioned by DeepSpeed ZeRO-3.

The attributes ``ds_*`` are those that DeepSpeed sets on a parameter that ZeRO-3 partitions.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of ``tensor``, sharing its memory. A ZeRO-3 shard is flat and excludes padding."""
    if is_zero3(tensor):
        start, end = zero3_range(tensor)
        return tensor.ds_tensor.detach()[: end - start]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of the unsharded tensor."""
    return tensor.ds_shape if is_zero3(tensor) else tensor.shape


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 has flattened and partitioned over the ranks."""
    return hasattr(tensor, "ds_tensor")


def zero3_range(parameter: Any) -> tuple[int, int]:
    """Return start and end of this rank's shard in the flattened parameter; the last shards may be short or empty."""
    size, rank = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)


def num_shards(tensor: torch.Tensor) -> int:
    """Return the number of distinct shards of ``tensor``; 1 if every rank has the full tensor."""
    if is_zero3(tensor):
        return tensor.ds_zero_partition_world_size
    if not isinstance(tensor, DTensor):
        return 1
    shards = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial()
        shards *= 1 if placement == Replicate() else size
    return shards


def shard_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard ``full``, which every rank has, in the same way as ``like``; no communication."""
    if is_zero3(like):
        start, end = zero3_range(like)
        return full.flatten()[start:end].to(like.ds_tensor.device)
    if not isinstance(like, DTensor):
        return full.to(like.device)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
