"""Saved tensors, of which each process reads what it holds: no model need fit into the memory of one of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from scratch_gpt.distributed.dtensor import full_shape, is_zero3, to_local, zero3_range
from scratch_gpt.errors import UserError


class SafetensorsReader:
    """The tensors in the safetensors files of ``folder`` by name, each whole, however what wrote them was spread."""

    def __init__(self, folder: Path, pattern: str):
        self.folder, self._place = folder, dict[str, Any]()
        for file in sorted(folder.glob(pattern)):
            opened = safe_open(file, framework="pt")
            self._place |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> Iterable[str]:
        return self._place.keys()

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A scalar, or a tensor that is spread as ``like`` is, of which only this process's part is read.

        Raises:
            UserError: there is no such tensor, or it has another shape.
        """
        saved = self._find(name, like)
        if saved.get_shape() and is_zero3(like):
            return self.read_range(name, like, *zero3_range(like))
        if not saved.get_shape() or not isinstance(like, DTensor):
            return self._place[name].get_tensor(name).to(like.device, copy=True)
        sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        own = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        # safetensors does not read nothing
        part = torch.empty(sizes) if 0 in sizes else saved[own]
        part = part.to(like.device, copy=True, memory_format=torch.contiguous_format)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def read_range(self, name: str, like: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The numbers from ``start`` to ``end`` of the flattened tensor, of which only the rows that have them are read.

        Raises:
            UserError: as :meth:`read`.
        """
        saved = self._find(name, like)
        width = full_shape(like)[1:].numel()
        first, last = start // width, -(-end // width)
        # safetensors does not read nothing
        rows = saved[first:last].flatten() if start < end else torch.empty(0)
        return rows[start - first * width : end - first * width].to(like.device, copy=True)

    def _find(self, name: str, like: torch.Tensor) -> Any:
        if name not in self._place:
            raise UserError(f"{self.folder} holds no {name}: is it a model of this package, in safetensors?")
        saved = self._place[name].get_slice(name)
        shape, expected = tuple(saved.get_shape()), tuple(full_shape(like))
        if shape not in ((), expected):
            raise UserError(f"{name} in {self.folder} has shape {shape}, the model's is {expected}")
        return saved


@torch.no_grad()
def load_weights(model: nn.Module, saved: SafetensorsReader) -> None:
    """Fill ``model`` as it is spread."""
    for name, parameter in model.named_parameters():
        to_local(parameter).copy_(to_local(saved.read(name, parameter)))
