"""A rank reads its shards of saved tensors; the other ranks are simulated."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from scratch_gpt.config import TrainingSettings
from scratch_gpt.distributed.dtensor import shard_like, to_local
from scratch_gpt.distributed.materialize import build_meta_model
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader, load_weights
from scratch_gpt.errors import UserError
from scratch_gpt.model.presets import preset
from scratch_gpt.planning.dry_run import fake_strategy

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 101, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
MESHES = [  # each shape once, because torch caches the coordinates of this rank in it
    ({"dp_shard": 3}, 2),
    ({"dp_shard": 61}, 0),
    ({"dp_shard": 67}, 30),  # more shards than some tensors have rows
    ({"dp_replicate": 2, "dp_shard": 3}, 5),
    ({"tp": 2}, 1),
    ({"dp_shard": 3, "tp": 2}, 3),
]


def save(config, optimizer, folder):
    """Save random weights and optimizer state of a model."""
    shapes = {name: parameter.shape for name, parameter in build_meta_model(config).named_parameters()}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = {}
    for name, shape in shapes.items():
        in_a_block = ".h." in name and len(shape) == 2
        if optimizer == "muon" and in_a_block:
            state[f"{name}.momentum_buffer"] = torch.randn(shape)
        else:
            state |= {f"{name}.{key}": torch.randn(shape) for key in ("exp_avg", "exp_avg_sq")}
            state[f"{name}.step"] = torch.tensor(7.0)
    save_file(weights, folder / "model.safetensors")
    save_file(state, folder / "optimizer.safetensors")


def load(config, optimizer, dimensions, rank, folder):
    """Build model and optimizer of one rank, and load them from ``folder``."""
    world = torch.Size(dimensions.values()).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        strategy = fake_strategy(dimensions, "cpu")
        model = build_meta_model(config)
        strategy.parallelize(model, "fp32")
        load_weights(model, SafetensorsReader(folder, "model*.safetensors"))
        optimizers = build_optimizer(model, TrainingSettings(optimizer=optimizer))
        optimizers.load_state_tensors(SafetensorsReader(folder, "optimizer.safetensors"))
    finally:
        dist.destroy_process_group()
    return model, optimizers


@pytest.mark.parametrize(("dimensions", "rank"), MESHES, ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_rank_reads_the_shards_that_torch_would_give_it(dimensions, rank, optimizer, tmp_path):
    config = preset("modern-30m", **SIZES, num_key_value_heads=2, intermediate_size=54)
    save(config, optimizer, tmp_path)
    full = load_file(tmp_path / "model.safetensors") | load_file(tmp_path / "optimizer.safetensors")
    model, optimizers = load(config, optimizer, dimensions, rank, tmp_path)
    loaded = dict(model.named_parameters()) | optimizers.state_tensors()
    assert loaded.keys() == full.keys()
    for name, tensor in loaded.items():
        if name.endswith(".step"):
            assert tensor == 7
            continue
        like = model.get_parameter(re.sub(r"\.(exp_avg(_sq)?|momentum_buffer)$", "", name))
        assert type(tensor.detach()) is type(like.detach()) and to_local(tensor).shape == to_local(like).shape
        assert torch.equal(to_local(tensor), to_local(shard_like(full[name], like))), name


def save_zeros(shapes, file):
    """Write a sparse file of zero tensors, which takes no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
@pytest.mark.parametrize("dimensions", [{"dp_shard": 59}, {"dp_shard": 9, "tp": 8}], ids=str)
def test_a_rank_never_holds_more_than_its_shards_and_one_tensor(dimensions, tmp_path, monkeypatch):
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 4096}
    config = preset("modern-30m", vocab_size=8192, **sizes, num_hidden_layers=4)
    shapes = {name: parameter.shape for name, parameter in build_meta_model(config).named_parameters()}
    save_zeros(shapes, tmp_path / "model.safetensors")
    state = {f"{name}.{key}": shape for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")}
    save_zeros(state | {f"{name}.step": torch.Size([]) for name in shapes}, tmp_path / "optimizer.safetensors")
    peak = [0]

    def read(saved, name, like, original=SafetensorsReader.read):
        shard = original(saved, name, like)
        peak.append(resident("RssAnon"))
        return shard

    monkeypatch.setattr(SafetensorsReader, "read", read)
    before, mapped = resident("RssAnon"), resident("RssFile")
    model, _ = load(config, "adamw", dimensions, 1, tmp_path)
    numels = [shape.numel() for shape in shapes.values()]
    local = 12 * sum(to_local(parameter).numel() for parameter in model.parameters())  # weights and two moments
    assert 12 * sum(numels) > 50 * local
    assert max(peak) - before < local + 4 * max(numels)
    after = resident("RssAnon") + resident("RssFile") - before - mapped
    assert after < local + 4 * max(numels)  # and the files are unmapped


def test_a_missing_tensor_or_another_shape_is_named(tmp_path):
    save_file({"one": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    saved = SafetensorsReader(tmp_path, "model*.safetensors")
    with pytest.raises(UserError, match=r"holds no two: is it a model of this package"):
        saved.read("two", torch.empty(2, 3))
    with pytest.raises(UserError, match=r"one in .* has shape \(2, 3\), the model's is \(3, 2\)"):
        saved.read("one", torch.empty(3, 2))


@pytest.mark.parametrize("shape", [(7, 3), (20,), (4, 5, 2)], ids=str)
def test_a_range_is_of_the_flattened_tensor(shape, tmp_path):
    full = torch.randn(shape)
    save_file({"one": full}, tmp_path / "model.safetensors")
    saved = SafetensorsReader(tmp_path, "model*.safetensors")
    for start, end in [(0, full.numel()), (4, 11), (5, 6), (6, 20), (9, 9), (full.numel(), full.numel())]:
        assert torch.equal(saved.read_range("one", full, start, end), full.flatten()[start:end])
