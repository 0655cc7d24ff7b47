"""What a process holds of a tensor: all of it, a part as torch's DTensor divides it, or one as DeepSpeed's ZeRO-3 does."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of ``tensor`` that this process holds; what changes in it changes in ``tensor``."""
    if is_zero3(tensor):
        start, end = zero3_range(tensor)
        return tensor.ds_tensor.detach()[: end - start]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of ``tensor`` with all its parts."""
    return tensor.ds_shape if is_zero3(tensor) else tensor.shape


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter that DeepSpeed's ZeRO-3 has cut into parts, the rows one after the other."""
    return hasattr(tensor, "ds_tensor")


def zero3_range(parameter: Any) -> tuple[int, int]:
    """Which numbers of the flattened parameter this process holds; the last part may be short, or empty."""
    size, rank = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)


def num_shards(tensor: torch.Tensor) -> int:
    """In how many different parts ``tensor`` lies on the processes; 1 where each has all of it."""
    if is_zero3(tensor):
        return tensor.ds_zero_partition_world_size
    if not isinstance(tensor, DTensor):
        return 1
    shards = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial()
        shards *= 1 if placement == Replicate() else size
    return shards


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``whole``, of which every process has a copy, as ``like`` is held."""
    if is_zero3(like):
        start, end = zero3_range(like)
        return whole.flatten()[start:end].to(like.ds_tensor.device)
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
