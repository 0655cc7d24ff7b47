"""One step of a sharded run without its devices: the real strategy and optimizer on a fake process group.

    scratch-gpt plan --config run.yaml --devices 64 --device-memory 80GB --dry-run

The collectives of torch's fake process group return at once, and tensors have shapes but no storage, so a laptop can act
as rank 0 of 4,096 for a model of any size. The memory that this rank would hold is then counted instead of predicted.

The fake process group is private to torch (`torch.testing._internal`); tests/planning/test_private_attributes.py checks
the names used here.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import TrainingSettings
from scratch_gpt.distributed.dtensor import to_local
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

CONTEXT_LENGTH = 8
"""Tokens of the one sequence in the step. The counted memory does not depend on it."""


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes on rank 0 after one step."""

    weights: int
    gradients: int
    optimizer: int
    parameters: dict[str, torch.Tensor]
    """The sharded parameters by name, without storage."""


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Act as rank 0 of ``world_size``. Collectives return at once, with meaningless results."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_strategy(mesh_sizes: dict[str, int], device: str) -> Strategy:
    """The FSDP2 or HSDP strategy, with or without tensor parallelism, on the fake process group.

    Args:
        mesh_sizes: dimensions of the device mesh by name, in the order of accelerate's `ParallelismConfig`:
            dp_replicate, dp_shard, tp.
    """
    mesh = init_device_mesh("cpu", tuple(mesh_sizes.values()), mesh_dim_names=tuple(mesh_sizes))
    accelerator: Any = SimpleNamespace(
        device=torch.device(device),
        num_processes=dist.get_world_size(),
        process_index=0,
        is_main_process=True,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=None, reshard_after_forward=True)),
    )
    name = "hsdp" if "dp_replicate" in mesh_sizes else "fsdp2"
    return Strategy(accelerator, f"{name} x tp" if "tp" in mesh_sizes else name, mesh)


def dry_run(
    config: ScratchGPTConfig, mesh_sizes: dict[str, int], precision: str, training: TrainingSettings
) -> MeasuredMemory:
    """Take one training step as rank 0 of a mesh with ``mesh_sizes``, and count what the rank holds after it."""
    with fake_process_group(math.prod(mesh_sizes.values())):
        strategy = fake_strategy(mesh_sizes, "meta")
        with torch.device("meta"):
            model = ScratchGPTForCausalLM(config).train()
        strategy.parallelize(model, precision)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizers = build_optimizer(model, training)
            tokens = torch.zeros(1, CONTEXT_LENGTH, dtype=torch.long)
            with autocast("cpu", precision), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a loss that is a view; nothing modifies it in place
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            for optimizer in optimizers.optimizers:
                optimizer.step()
        parameters = dict(model.named_parameters())
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        moments = [tensor for tensor in optimizers.state_tensors().values() if tensor.ndim]
        return MeasuredMemory(
            weights=_local_bytes(parameters.values()),
            gradients=_local_bytes(gradients),
            optimizer=_local_bytes(moments),
            parameters=parameters,
        )


def _local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(to_local(tensor).nbytes for tensor in tensors)
