"""Read from safetensors files only the shards that this rank holds, so that no rank needs memory for a full model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from scratch_gpt.distributed.dtensor import full_shape, is_zero3, to_local, zero3_range
from scratch_gpt.errors import UserError


class SafetensorsReader:
    """The full tensors, by name, in the safetensors files of ``folder`` that match ``pattern``."""

    def __init__(self, folder: Path, pattern: str):
        self.folder, self._file_of = folder, dict[str, Any]()
        for path in sorted(folder.glob(pattern)):
            file = safe_open(path, framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the tensor ``name`` sharded as ``like`` is, reading this rank's shard only. A scalar is returned in full.

        Raises:
            UserError: There is no such tensor, or it has another shape.
        """
        saved = self._find(name, like)
        if saved.get_shape() and is_zero3(like):
            return self.read_range(name, like, *zero3_range(like))
        if not saved.get_shape() or not isinstance(like, DTensor):
            return self._file_of[name].get_tensor(name).to(like.device, copy=True)
        (chunk,) = like.__create_chunk_list__()  # a DTensor's protocol with torch.distributed.checkpoint
        index = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        # safetensors refuses to read empty slices
        shard = torch.empty(chunk.sizes) if 0 in chunk.sizes else saved[index]
        shard = shard.to(like.device, copy=True, memory_format=torch.contiguous_format)
        return DTensor.from_local(
            shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def read_range(self, name: str, like: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Return elements ``start`` to ``end`` of the flattened tensor, (end - start,); only the rows that contain them
        are read.

        Raises:
            UserError: There is no such tensor, or its shape is not the full shape of ``like``.
        """
        saved = self._find(name, like)
        row_numel = full_shape(like)[1:].numel()
        first, last = start // row_numel, -(-end // row_numel)
        # safetensors refuses to read empty slices
        rows = saved[first:last].flatten() if start < end else torch.empty(0)
        return rows[start - first * row_numel : end - first * row_numel].to(like.device, copy=True)

    def _find(self, name: str, like: torch.Tensor) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.folder} holds no {name}: is it a model of this package, in safetensors?")
        saved = self._file_of[name].get_slice(name)
        shape, expected = tuple(saved.get_shape()), tuple(full_shape(like))
        if shape not in ((), expected):
            raise UserError(f"{name} in {self.folder} has shape {shape}, the model's is {expected}")
        return saved


@torch.no_grad()
def load_weights(model: nn.Module, saved: SafetensorsReader) -> None:
    """Load this rank's shards of all parameters of ``model``."""
    for name, parameter in model.named_parameters():
        to_local(parameter).copy_(to_local(saved.read(name, parameter)))
