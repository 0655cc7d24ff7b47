"""`program.py` for ZeRO: records from DeepSpeed's engine what is sharded, and in how many bytes."""

import functools
import json
import sys

from deepspeed.comm.torch import TorchBackend

from scratch_gpt.cli import leave
from scratch_gpt.distributed.deepspeed import DeepSpeedStrategy
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.training.spike_guard import SpikeGuard
from tests.distributed import program
from tests.distributed.spoilt import problem

between: list[int] = []
"""Gradient elements that this rank held when a micro-batch began that was not the first of its step."""
ongoing: list[bool] = []
"""Not empty after the first micro-batch of a step."""
read: list[int] = []
"""Elements of the shards that were read from a checkpoint."""


def distinct_numel(tensors):
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors if tensor is not None}.values())


def facts(trainer):
    engine = trainer.model
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    states = [value for state in zero.optimizer.state.values() for value in state.values() if value.dim()]
    found = {
        "stage": engine.zero_optimization_stage(),
        "total": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "weights": sum(p.numel() for p in parameters),
        "parts": sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor")),
        "state_bytes": sum(value.numel() * value.element_size() for value in states),
        "gradients": sorted(set(between)),
        "read": sum(read),
        "offload": [bool(getattr(zero, name, False)) for name in ("cpu_offload", "offload_optimizer", "offload_param")],
    }
    between.clear()
    read.clear()
    return found


def read_range(saved, name, like, start, end, original=SafetensorsReader.read_range):
    part = original(saved, name, like, start, end)
    read.append(part.numel())
    return part


def micro_batch(strategy, model, last, original=DeepSpeedStrategy.micro_batch):
    if ongoing:
        zero = model.optimizer
        kept = [shard for shards in getattr(zero, "all_grad_tensors", {}).values() for shard in shards or ()]
        kept += [shard for shards in zero.averaged_gradients.values() for shard in shards or ()]
        if strategy.stage == 3 and not kept:
            kept = list(zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())
        between.append(distinct_numel([*kept, *(parameter.grad for parameter in model.module.parameters())]))
    ongoing[:] = [] if last else [True]
    return original(strategy, model, last)


def noting(collective):
    @functools.wraps(collective)
    def send(self, *arguments, **keywords):
        tensor = keywords.get("tensor", arguments[0] if arguments else None)
        if tensor.numel() > 1:  # not a norm
            program.reduced.add(str(tensor.dtype))
        return collective(self, *arguments, **keywords)

    return send


program.more_facts = facts
SpikeGuard.problem = problem
SafetensorsReader.read_range = read_range
DeepSpeedStrategy.parallelize = functools.partialmethod(program.parallelize, original=DeepSpeedStrategy.parallelize)
DeepSpeedStrategy.micro_batch = micro_batch
for name in ("all_reduce", "reduce"):  # collectives of stages 1 and 2; stage 3 uses those of FSDP2
    setattr(TorchBackend, name, noting(getattr(TorchBackend, name)))

if __name__ == "__main__":
    leave(program.run_all(json.loads(sys.argv[1])))
