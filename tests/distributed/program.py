"""Do several runs in the processes of one launch, and record what was in effect: facts-{rank}.json in each run directory."""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scratch_gpt.cli import leave, main
from scratch_gpt.distributed.dtensor import to_local
from scratch_gpt.distributed.pipeline import PipelineStrategy
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.training.trainer import Trainer

reduced: set[str] = set()
"""Dtypes in which gradients were reduce-scattered."""


def noting(collective):
    def send(output, input, *arguments, **keywords):
        reduced.add(str(input.dtype))
        return collective(output, input, *arguments, **keywords)

    return send


def run(trainer, original=Trainer.run):
    reduced.clear()
    loss_dtypes = set()
    seq_lengths = set()

    def note(model, inputs, arguments, output):
        loss_dtypes.update([] if output.loss is None else [str(output.loss.dtype)])
        seq_lengths.update([] if "shift_labels" not in arguments else [arguments["shift_labels"].shape[1]])

    hook = trainer.model.register_forward_hook(note, with_kwargs=True)

    try:
        original(trainer)
    finally:
        hook.remove()
        parameters = list(trainer.model.parameters())
        placements = {str(p.placements) for p in parameters if isinstance(p, DTensor)}
        held = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        facts = {
            "model": type(trainer.model).__name__,
            "world": dist.get_world_size(),
            "parameters": len(parameters),
            "dtensors": sum(isinstance(p, DTensor) for p in parameters),
            "placements": sorted(placements),
            "meshes": sorted({str(p.device_mesh.mesh.tolist()) for p in parameters if isinstance(p, DTensor)}),
            "held": sum(p.numel() for p in held),
            "total": sum(p.numel() for p in parameters),
            "dtypes": sorted({str(p.dtype) for p in held}),
            "loss": sorted(loss_dtypes),
            "seq_lengths": sorted(seq_lengths),
            "began_on_meta": began_on_meta[-1],
            "read": sum(numel_read),
            "graphs": compiled_graphs(),
            "offload": sorted(offload_policies(trainer.model)),
            "reduced": sorted(reduced),
            "stages": len(getattr(trainer.model, "stages", ())),
            **more_facts(trainer),
        }
        Path(trainer.run_dir, f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))


def more_facts(trainer):
    """Further facts; other programs replace this function."""
    return {}


def compiled_graphs():
    """The number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def offload_policies(model):
    """The offload policies of FSDP's parameter groups."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [module._get_fsdp_state()._fsdp_param_group for module in modules]
    return {type(group.offload_policy).__name__ for group in groups if group is not None}


def parallelize(strategy, model, precision, roots=None, original=Strategy.parallelize):
    numel_read.clear()
    began_on_meta.append(all(parameter.is_meta for parameter in model.parameters()))
    return original(strategy, model, precision, roots)


def read(saved, name, like, original=SafetensorsReader.read):
    tensor = original(saved, name, like)
    numel_read.append(to_local(tensor).numel() if tensor.ndim else 0)
    return tensor


began_on_meta: list[bool] = [False]
"""Whether the model was on the meta device before it was sharded."""
numel_read: list[int] = []
"""Elements read of saved weights and optimizer state, tensor by tensor."""
SafetensorsReader.read = read
Strategy.parallelize = parallelize
PipelineStrategy.parallelize = functools.partialmethod(parallelize, original=PipelineStrategy.parallelize)
Trainer.run = run
for name in ("reduce_scatter_single", "reduce_scatter_tensor"):  # of torch 2.13, and before
    if hasattr(dist, name):
        setattr(dist, name, noting(getattr(dist, name)))
Accelerator.end_training = lambda self: None  # the next run needs the processes
torch.set_num_threads(1)


def run_all(runs):
    """Do ``runs``, each a list of arguments; return the first exit code that is not 0."""
    code = 0
    for arguments in runs:
        code = code or main(arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    leave(run_all(json.loads(sys.argv[1])))
