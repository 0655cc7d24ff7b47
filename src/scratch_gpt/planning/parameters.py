"""Exact numbers of parameters: of the model, of its parts, and of the shard on one device."""

from dataclasses import dataclass
from typing import Literal

import torch

from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.planning.activations import FP32

TensorParallelSplit = Literal["rows", "columns", "none"]


@dataclass(frozen=True)
class ParameterShape:
    """The shape of one parameter; a vector counts as a matrix with one column."""

    name: str
    rows: int
    columns: int
    split: TensorParallelSplit
    """The dimension that tensor parallelism shards."""

    def local_elements(self, shards: int, tensor_parallel: int) -> int:
        """Elements on the device that has the most: FSDP2 shards by rows, after tensor parallelism."""
        rows = -(-self.rows // (tensor_parallel if self.split == "rows" else 1))
        columns = self.columns // (tensor_parallel if self.split == "columns" else 1)
        return -(-rows // shards) * columns


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; a tied head is counted once, with the embeddings."""

    total: int
    embeddings: int
    head: int
    """0 for a tied head."""
    largest_block: int
    shapes: tuple[ParameterShape, ...]

    def local_elements(self, shards: int = 1, tensor_parallel: int = 1) -> int:
        """Elements on the device that has the most, each parameter being sharded on its own as FSDP2 does."""
        return sum(shape.local_elements(shards, tensor_parallel) for shape in self.shapes)


def parameter_counts(config: ScratchGPTConfig) -> ParameterCounts:
    """Count the parameters of the model itself, built on the meta device."""
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def count(*name_parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in name_parts))

    return ParameterCounts(
        total=sum(sizes.values()),
        embeddings=count(".wte.", ".wpe."),
        head=count("lm_head"),
        largest_block=max((sum(p.numel() for p in block.parameters()) for block in model.transformer.h), default=0),
        shapes=tuple(
            ParameterShape(name, len(parameter), parameter.numel() // len(parameter), _tensor_parallel_split(name))
            for name, parameter in model.named_parameters()
        ),
    )


def _tensor_parallel_split(name: str) -> TensorParallelSplit:
    """The split in the model's tensor-parallel plan: matrices that write to the residual stream by columns."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return "columns"
    by_rows = (
        *(f"{projection}_proj.{part}" for projection in ("q", "k", "v", "gate", "up") for part in ("weight", "bias")),
        *("wte.weight", "lm_head.weight", "lm_head.bias"),
    )
    return "rows" if name.endswith(by_rows) else "none"


def optimizer_state_bytes(
    parameters: ParameterCounts, optimizer: str = "adamw", shards: int = 1, tensor_parallel: int = 1
) -> float:
    """Bytes of float32 optimizer state on the device that has the most.

    AdamW keeps two moments for each parameter. Muon keeps one momentum for the projections; AdamW updates the rest.
    """
    elements = sum(
        (1 if optimizer == "muon" and shape.name.endswith("_proj.weight") else 2)
        * shape.local_elements(shards, tensor_parallel)
        for shape in parameters.shapes
    )
    return FP32 * elements
