"""docs/scaling.md: the script prints its tables, and collectives really send the predicted volumes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scratch_gpt.compute.precision import autocast
from scratch_gpt.model import ScratchGPTForCausalLM
from scratch_gpt.model.presets import preset
from scratch_gpt.planning.activations import Workload
from scratch_gpt.planning.dry_run import fake_process_group, fake_strategy
from scratch_gpt.planning.layouts import Layout

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_document_contains_the_tables_of_the_script(scaling):
    document = (ROOT / "docs/scaling.md").read_text()
    assert scaling.plan_table() in document
    assert scaling.published_table() in document
    assert scaling.comparison_table() in document


class CollectiveVolume(TorchDispatchMode):
    """Count the bytes that each rank of a ring of ``group_size`` sends.

    ``gathered``: all-gathers and reduce-scatters; ``reduced``: all-reduces, which send twice as much.
    """

    def __init__(self, group_size):
        super().__init__()
        self.group_size, self.gathered, self.reduced = group_size, 0.0, 0.0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name, others = str(function), (self.group_size - 1) / self.group_size
        if "c10d" not in name:
            return function(*arguments, **(keywords or {}))
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        if "allreduce_" in name or "functional.all_reduce" in name:
            self.reduced += 2 * others * first.nbytes
        elif "c10d_functional.all_gather" in name:
            self.gathered += others * self.group_size * first.nbytes
        elif "_allgather_base_" in name:
            self.gathered += others * first.nbytes
        elif "_reduce_scatter_base_" in name:
            self.gathered += others * arguments[1].nbytes
        return function(*arguments, **(keywords or {}))


def measure_volume(config, mesh_sizes, group_size, workload):
    with fake_process_group(torch.Size(mesh_sizes.values()).numel()):
        strategy = fake_strategy(mesh_sizes, "cpu")
        model = ScratchGPTForCausalLM(config).train()
        if workload.checkpointing:
            model.gradient_checkpointing_enable()
        strategy.parallelize(model, workload.precision)
        tokens = torch.zeros(workload.sequences, workload.context_length, dtype=torch.long)
        with CollectiveVolume(group_size) as volume:
            with autocast("cpu", workload.precision):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
    return volume


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mesh_sizes", [{"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 4}, {"tp": 4}], ids=str)
def test_predicted_volume_is_what_collectives_send(scaling, mesh_sizes, checkpointing):
    config = preset("modern-30m", vocab_size=2048, num_key_value_heads=4, num_attention_heads=12, num_hidden_layers=3)
    workload = Workload(2, 64, "bf16", "cpu", checkpointing)
    replicas, shards, tensor = (mesh_sizes.get(name, 1) for name in ("dp_replicate", "dp_shard", "tp"))
    layout = Layout("", replicas * shards * tensor, "", shards, shards, shards, tensor)
    predicted = scaling.communication_volume(scaling.Model(config, 64, 0), layout, workload, 1)
    measured = measure_volume(config, mesh_sizes, 4, workload)
    if tensor > 1:
        assert predicted.tensor == pytest.approx(measured.reduced + measured.gathered, rel=0.01)
        return
    assert predicted.shards == pytest.approx(measured.gathered, rel=0.01)
    over_two_replicas = measured.reduced * (1 / 2) / (3 / 4)  # measured as if they were a ring of 4
    assert predicted.copies == pytest.approx(over_two_replicas, rel=0.01)
