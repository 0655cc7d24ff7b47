"""Every layout gives the run of a single process with the same batches, and is really in force."""

import pytest

from tests.distributed.launch import alone, arguments, assert_same_run, configuration, curve, facts, launch

STEPS = 20
RECOMPUTE = ["--training.activation_checkpointing", "full", "--training.device_batch_size", "2"]


@pytest.fixture(scope="module")
def single(tmp_path_factory, shards):
    """The runs of one process: folder by style."""
    folder = tmp_path_factory.mktemp("single")
    alone(*(arguments(folder / style, shards, style, STEPS) for style in ("gpt2", "modern")))
    alone(arguments(folder / "bf16", shards, "modern", STEPS, "--training.precision", "bf16"))
    return folder


def runs(folder, shards):
    """GPT-2 style in one pass; modern style recomputed and in several micro-batches; bf16."""
    return [
        arguments(folder / "gpt2", shards, "gpt2", STEPS),
        arguments(folder / "modern", shards, "modern", STEPS, *RECOMPUTE),
        arguments(folder / "bf16", shards, "modern", STEPS, "--training.precision", "bf16"),
    ]


def check(folder, single):
    for style in ("gpt2", "modern"):
        assert_same_run(single / style, folder / style, STEPS)
    for key, rel in (("loss", 0.005), ("grad_norm", 0.06)):  # roundings of other sums
        assert curve(folder / "bf16", key) == pytest.approx(curve(single / "bf16", key), rel=rel), key


def test_data_parallel(single, shards, tmp_path):
    done = launch(configuration("ddp", tmp_path, 2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert process["model"] == "DistributedDataParallel" and process["world"] == 2
    assert "ddp on 2 process(es), cpu" in done.stdout


def assert_sharded(process, shards):
    assert process["dtensors"] == process["parameters"] and process["dtypes"] == ["torch.float32"]
    assert process["held"] == pytest.approx(process["total"] / shards, rel=0.05)
    assert process["reduced"] == ["torch.float32"] and process["loss"] == ["torch.float32"]


def test_fully_sharded(single, shards, tmp_path):
    done = launch(configuration("fsdp2", tmp_path, 2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_sharded(process, 2)
            assert process["meshes"] == ["[0, 1]"] and process["placements"] == ["(Shard(dim=0),)"]
    assert "fsdp2 on 2 process(es), dp_shard 2, cpu" in done.stdout
    assert "36 of 36 parameters sharded" in done.stdout and "2 of 2 blocks recomputed" in done.stdout


def test_hybrid_sharded(single, shards, tmp_path):
    config = configuration("hsdp", tmp_path, 4, dp_replicate_size=2, dp_shard_size=2)
    launch(config, *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_sharded(process, 2)
            assert process["meshes"] == ["[[0, 1], [2, 3]]"]
            assert process["placements"] == ["(Replicate(), Shard(dim=0))"]


def assert_divided(process, shards, tensor):
    """Matrices in ``shards * tensor`` parts; norms and biases of the residual stream in ``shards``."""
    assert process["held"] < 1.15 * process["total"] / (shards * tensor)
    assert process["loss"] == ["torch.float32"]


def test_tensor_parallel(single, shards, tmp_path):
    done = launch(configuration("tp", tmp_path, 2, tp_size=2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_divided(process, 1, 2)
            assert process["meshes"] == ["[0, 1]"] and "(Shard(dim=1),)" in process["placements"]
    assert "tp on 2 process(es), tp 2, cpu" in done.stdout


def test_fully_sharded_and_tensor_parallel(single, shards, tmp_path):
    config = configuration("fsdp2_tp", tmp_path, 4, dp_shard_size=2, tp_size=2)
    done = launch(config, *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_divided(process, 2, 2)
            assert "[[0, 1], [2, 3]]" in process["meshes"] and len(process["meshes"]) == 2  # norms: of dp_shard only
    assert "fsdp2 x tp on 4 process(es), dp_shard 2 x tp 2, cpu" in done.stdout
