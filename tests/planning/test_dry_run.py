"""The memory that a rank of a large run holds equals the plan, tensor by tensor, measured without devices."""

import resource

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from scratch_gpt.config import PlanSettings, TrainingSettings
from scratch_gpt.model.presets import preset
from scratch_gpt.planning.activations import Workload
from scratch_gpt.planning.dry_run import dry_run, fake_process_group, fake_strategy
from scratch_gpt.planning.layouts import Layout
from scratch_gpt.planning.memory import estimate_memory
from scratch_gpt.planning.parameters import parameter_counts
from scratch_gpt.planning.plan import describe
from scratch_gpt.planning.planner import Plan
from tests.planning.test_plan import CONFIGS, build, forward

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_measured_equals_planned(config, mesh_sizes, optimizer="adamw"):
    """Weights, gradients and optimizer state need exactly the planned bytes."""
    measured = dry_run(config, mesh_sizes, "bf16", TrainingSettings(optimizer=optimizer))
    replicas, shards, tensor = (mesh_sizes.get(name, 1) for name in ("dp_replicate", "dp_shard", "tp"))
    layout = Layout("", replicas * shards * tensor, "", shards, shards, shards, tensor)
    planned = estimate_memory(config, parameter_counts(config), layout, Workload(1, 8), optimizer)
    assert (measured.weights, measured.gradients, measured.optimizer) == (
        planned.weights,
        planned.gradients,
        planned.optimizer,
    )
    return measured


def test_rank_of_64_holds_the_planned_memory_of_7b_without_allocating_it():
    config = preset("modern-7b")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = assert_measured_equals_planned(config, {"dp_shard": 64})
    allocated = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert allocated < measured.weights + measured.gradients + measured.optimizer  # less than the shard of one rank
    assert sum(parameter.numel() for parameter in measured.parameters.values()) == parameter_counts(config).total
    for parameter in measured.parameters.values():
        assert parameter.device_mesh.shape == (64,) and parameter.placements[0].is_shard(0)
        rows, *columns = parameter.shape
        assert parameter.to_local().shape == (rows / 64, *columns)


def test_hsdp_shards_within_replicas():
    measured = assert_measured_equals_planned(
        preset("modern-7b", num_hidden_layers=2), {"dp_replicate": 8, "dp_shard": 8}
    )
    matrix = measured.parameters["transformer.h.0.mlp.up_proj.weight"]
    assert matrix.device_mesh.mesh_dim_names == ("dp_replicate", "dp_shard")
    assert matrix.to_local().shape == (14336 / 8, 4096)


def test_fsdp2_shards_tensor_parallel_matrices():
    measured = assert_measured_equals_planned(preset("modern-7b", num_hidden_layers=2), {"dp_shard": 8, "tp": 8})
    up, down = (
        measured.parameters[f"transformer.h.0.mlp.{name}.weight"].to_local() for name in ("up_proj", "down_proj")
    )
    assert up.shape == (14336 / 64, 4096) and down.shape == (4096 / 8, 14336 / 8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rank_0_holds_more_when_rows_are_not_divisible(optimizer):
    config = preset("gpt2", num_hidden_layers=2)  # 50,257 rows
    measured = assert_measured_equals_planned(config, {"dp_shard": 64}, optimizer)
    assert measured.parameters["transformer.wte.weight"].to_local().shape == (786, 768)
    assert measured.weights > 4 * parameter_counts(config).total / 64


def test_plan_prints_what_the_dry_run_measures():
    settings = PlanSettings(devices=16, device_memory="2GB", dry_run=True)
    settings.model.preset = "modern-135m"
    settings.training = TrainingSettings(precision="bf16", context_length=512, total_batch_size=16 * 512)
    line = list(describe(Plan(settings)))[-1]
    assert "the first of 16 devices holds 0.034 GB of weights (0.034 planned)" in line


@pytest.mark.parametrize("name", ["modern, grouped queries", "untied head", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_total_covers_the_peak_of_a_sharded_step(name, checkpointing, precision):
    workload = Workload(2, 300, precision, "cpu", checkpointing)
    with fake_process_group(4):
        config, model = build(CONFIGS[name], workload)
        fake_strategy({"dp_shard": 4}, "cpu").parallelize(model, precision)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        forward(model, workload).backward()
        optimizer.step()
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            forward(model, workload).backward()
        peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    layout = Layout("", 4, "", 4, 4, 4)
    planned = estimate_memory(config, parameter_counts(config), layout, workload).total
    assert peak <= planned <= 1.12 * peak
