"""docs/scaling.md: its tables are those of the script, and the volumes in them are really sent."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scratch_gpt.compute.precision import autocast
from scratch_gpt.model import ScratchGPTForCausalLM
from scratch_gpt.model.presets import preset
from scratch_gpt.planning.dry_run import fake_process_group, fake_strategy
from scratch_gpt.planning.memory import Workload
from scratch_gpt.planning.plan import Layout

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_document_are_those_of_the_script(scaling):
    document = (ROOT / "docs/scaling.md").read_text()
    assert scaling.plan_table() in document
    assert scaling.published_table() in document
    assert scaling.beside_table() in document


class Collectives(TorchDispatchMode):
    """Bytes that a ring sends for each device: of what is gathered and scattered once, of what is added up twice."""

    def __init__(self, group):
        super().__init__()
        self.group, self.scattered, self.summed = group, 0.0, 0.0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name, others = str(function), (self.group - 1) / self.group
        if "c10d" not in name:
            return function(*arguments, **(keywords or {}))
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        if "allreduce_" in name or "functional.all_reduce" in name:
            self.summed += 2 * others * first.nbytes
        elif "c10d_functional.all_gather" in name:
            self.scattered += others * self.group * first.nbytes
        elif "_allgather_base_" in name:
            self.scattered += others * first.nbytes
        elif "_reduce_scatter_base_" in name:
            self.scattered += others * arguments[1].nbytes
        return function(*arguments, **(keywords or {}))


def really_sent(config, dimensions, group, load):
    with fake_process_group(torch.Size(dimensions.values()).numel()):
        layout = fake_strategy(dimensions, "cpu")
        model = ScratchGPTForCausalLM(config).train()
        if load.checkpointing:
            model.gradient_checkpointing_enable()
        layout.parallelize(model, load.precision)
        tokens = torch.zeros(load.rows, load.context, dtype=torch.long)
        with Collectives(group) as collectives:
            with autocast("cpu", load.precision):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
    return collectives


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dimensions", [{"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 4}, {"tp": 4}], ids=str)
def test_what_the_formulas_send_is_sent(scaling, dimensions, checkpointing):
    config = preset("modern-30m", vocab_size=2048, num_key_value_heads=4, num_attention_heads=12, num_hidden_layers=3)
    load = Workload(2, 64, "bf16", "cpu", checkpointing)
    copies, shards, tensor = (dimensions.get(name, 1) for name in ("dp_replicate", "dp_shard", "tp"))
    layout = Layout("", copies * shards * tensor, "", shards, shards, shards, tensor)
    planned = scaling.sent(scaling.Model(config, 64, 0), layout, load, 1)
    counted = really_sent(config, dimensions, 4, load)
    if tensor > 1:
        assert planned.tensor == pytest.approx(counted.summed + counted.scattered, rel=0.01)
        return
    assert planned.shards == pytest.approx(counted.scattered, rel=0.01)
    among_two = counted.summed * (1 / 2) / (3 / 4)
    assert planned.copies == pytest.approx(among_two, rel=0.01)
