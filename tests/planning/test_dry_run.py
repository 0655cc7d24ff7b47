"""What a process of a large run holds, tensor by tensor, against the plan; no process, device or gigabyte is needed."""

import resource

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from scratch_gpt.config import PlanSettings, TrainingSettings
from scratch_gpt.model.presets import preset
from scratch_gpt.planning import memory as footprint
from scratch_gpt.planning import plan as planner
from scratch_gpt.planning.dry_run import dry_run, fake_process_group, fake_strategy
from scratch_gpt.planning.memory import Workload
from tests.planning.test_plan import CONFIGS, build, forward

pytestmark = pytest.mark.filterwarnings("ignore")


def check(config, dimensions, optimizer="adamw"):
    """Bytes of weights, gradients and optimizer state are those of the plan, to the byte."""
    held = dry_run(config, dimensions, "bf16", TrainingSettings(optimizer=optimizer))
    copies, shards, tensor = (dimensions.get(name, 1) for name in ("dp_replicate", "dp_shard", "tp"))
    strategy = planner.Layout("", copies * shards * tensor, "", shards, shards, shards, tensor)
    planned = planner.memory(config, footprint.count(config), strategy, Workload(1, 8), optimizer)
    assert (held.weights, held.gradients, held.optimizer) == (planned.weights, planned.gradients, planned.optimizer)
    return held


def test_7b_on_64_processes_holds_what_is_planned_and_is_never_materialised():
    config = preset("modern-7b")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = check(config, {"dp_shard": 64})
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert taken < held.weights + held.gradients + held.optimizer  # not even one process's share was ever allocated
    assert sum(parameter.numel() for parameter in held.parameters.values()) == footprint.count(config).total
    for parameter in held.parameters.values():
        assert parameter.device_mesh.shape == (64,) and parameter.placements[0].is_shard(0)
        rows, *columns = parameter.shape
        assert parameter.to_local().shape == (rows / 64, *columns)


def test_copies_of_shards():
    held = check(preset("modern-7b", num_hidden_layers=2), {"dp_replicate": 8, "dp_shard": 8})
    matrix = held.parameters["transformer.h.0.mlp.up_proj.weight"]
    assert matrix.device_mesh.mesh_dim_names == ("dp_replicate", "dp_shard")
    assert matrix.to_local().shape == (14336 / 8, 4096)


def test_shards_of_divided_matrices():
    held = check(preset("modern-7b", num_hidden_layers=2), {"dp_shard": 8, "tp": 8})
    up, down = (held.parameters[f"transformer.h.0.mlp.{name}.weight"].to_local() for name in ("up_proj", "down_proj"))
    assert up.shape == (14336 / 64, 4096) and down.shape == (4096 / 8, 14336 / 8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_that_do_not_divide_leave_more_on_the_first_process(optimizer):
    config = preset("gpt2", num_hidden_layers=2)  # 50,257 rows
    held = check(config, {"dp_shard": 64}, optimizer)
    assert held.parameters["transformer.wte.weight"].to_local().shape == (786, 768)
    assert held.weights > 4 * footprint.count(config).total / 64


def test_dry_run_counts_what_the_plan_says():
    settings = PlanSettings(devices=16, device_memory="2GB", dry_run=True)
    settings.model.preset = "modern-135m"
    settings.training = TrainingSettings(precision="bf16", context_length=512, total_batch_size=16 * 512)
    line = list(planner.describe(planner.Plan(settings)))[-1]
    assert "the first of 16 devices holds 0.034 GB of weights (0.034 planned)" in line


@pytest.mark.parametrize("name", ["modern, grouped queries", "untied head", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_total_covers_the_peak_of_a_sharded_step(name, checkpointing, precision):
    load = Workload(2, 300, precision, "cpu", checkpointing)
    with fake_process_group(4):
        config, model = build(CONFIGS[name], load)
        fake_strategy({"dp_shard": 4}, "cpu").parallelize(model, precision)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        forward(model, load).backward()
        optimizer.step()
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            forward(model, load).backward()
        peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    strategy = planner.Layout("", 4, "", 4, 4, 4)
    planned = planner.memory(config, footprint.count(config), strategy, load).total
    assert peak <= planned <= 1.12 * peak
