"""`program.py` for ZeRO, where what is in force is to be read off DeepSpeed's engine: in what parts things lie, in bytes."""

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
"""Numbers of gradients that the process held when a micro-batch began that was not the first of its step."""
ongoing: list[bool] = []
"""Whether a micro-batch of the step is done."""
read: list[int] = []
"""Numbers of the parts of tensors that were read from a checkpoint."""


def numbers(tensors):
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors if tensor is not None}.values())


def facts(loop):
    engine = loop.model
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
        kept = [piece for pieces in getattr(zero, "all_grad_tensors", {}).values() for piece in pieces or ()]
        kept += [piece for pieces in zero.averaged_gradients.values() for piece in pieces or ()]
        if strategy.stage == 3 and not kept:
            kept = list(zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())
        between.append(numbers([*kept, *(parameter.grad for parameter in model.module.parameters())]))
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
for name in ("all_reduce", "reduce"):  # stages 1 and 2 send gradients so; stage 3 as FSDP2 does
    setattr(TorchBackend, name, noting(getattr(TorchBackend, name)))

if __name__ == "__main__":
    leave(program.run_all(json.loads(sys.argv[1])))
