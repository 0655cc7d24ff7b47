"""One step of a sharded run without its devices: the run's own layout and optimizer, on processes that do not exist.

    scratch-gpt plan --config run.yaml --devices 64 --device-memory 80GB --dry-run

torch's fake process group answers for the other processes, and tensors have shapes but no memory, so that the first of 4,096
processes of a model of any size fits on a laptop. What it would hold is then counted and not planned.
"""

import warnings
from collections.abc import Iterator
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

TOKENS = 8
"""Of the row that is trained on: what is counted does not depend on it."""


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes on the first device after a step."""

    weights: int
    gradients: int
    optimizer: int
    parameters: dict[str, torch.Tensor]
    """By name, as they are spread; without memory."""


@contextmanager
def fake_process_group(number: int) -> Iterator[None]:
    """This process is the first of ``number`` whose collectives return at once and with nothing of use."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_strategy(dimensions: dict[str, int], device: str) -> Strategy:
    """The layout over as many processes as there are; ``dimensions`` are those of `parallelism_config`, in its order."""
    mesh = init_device_mesh("cpu", tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
    accelerator: Any = SimpleNamespace(
        device=torch.device(device),
        num_processes=dist.get_world_size(),
        process_index=0,
        is_main_process=True,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=None, reshard_after_forward=True)),
    )
    strategy = "hsdp" if "dp_replicate" in dimensions else "fsdp2"
    return Strategy(accelerator, f"{strategy} x tp" if "tp" in dimensions else strategy, mesh)


def dry_run(
    config: ScratchGPTConfig, dimensions: dict[str, int], precision: str, training: TrainingSettings
) -> MeasuredMemory:
    """A step over the product of ``dimensions`` processes."""
    processes = 1
    for size in dimensions.values():
        processes *= size
    with fake_process_group(processes):
        strategy = fake_strategy(dimensions, "meta")
        with torch.device("meta"):
            model = ScratchGPTForCausalLM(config).train()
        strategy.parallelize(model, precision)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizers = build_optimizer(model, training)
            tokens = torch.zeros(1, TOKENS, dtype=torch.long)
            with autocast("cpu", precision), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a loss that is a view: nobody changes it in place
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            for optimizer in optimizers.optimizers:
                optimizer.step()
        parameters = dict(model.named_parameters())
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        moments = [value for value in optimizers.state_tensors().values() if value.ndim]
        return MeasuredMemory(_bytes(parameters.values()), _bytes(gradients), _bytes(moments), parameters)


def _bytes(tensors: Any) -> int:
    return sum(to_local(tensor).nbytes for tensor in tensors)
