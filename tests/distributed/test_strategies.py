"""Every strategy gives the run of a single process with the same batches, and is in effect."""

import pytest

from scratch_gpt.training.metrics import read_events
from tests.distributed.launch import alone, arguments, assert_same_run, configuration, curve, facts, launch
from tests.training.test_monitor import write_task

STEPS = 20
RECOMPUTE = ["--training.activation_checkpointing", "full", "--training.device_batch_size", "2"]

MONITORED = [("ddp", {}), ("fsdp2", {}), ("tp", {"tp_size": 2}), ("fsdp2_cp", {"dp_shard_size": 1, "cp_size": 2})]
OTHERS = {"bf16": ["--training.precision", "bf16"], "muon": ["--training.optimizer", "muon"]}


@pytest.fixture(scope="module")
def single(tmp_path_factory, shards):
    """The runs of one process, in one folder for each style."""
    folder = tmp_path_factory.mktemp("single")
    alone(*(arguments(folder / style, shards, style, STEPS) for style in ("gpt2", "modern")))
    for name, more in OTHERS.items():
        alone(arguments(folder / name, shards, "modern", STEPS, *more))
    return folder


def runs(folder, shards):
    """GPT-2 style in one micro-batch; modern style with recomputation in several; in bf16; with Muon."""
    return [
        arguments(folder / "gpt2", shards, "gpt2", STEPS),
        arguments(folder / "modern", shards, "modern", STEPS, *RECOMPUTE),
        *(arguments(folder / name, shards, "modern", STEPS, *more) for name, more in OTHERS.items()),
    ]


def check(folder, single):
    for style in ("gpt2", "modern"):
        assert_same_run(single / style, folder / style, STEPS)
    for name, rel, rel_norm in (
        ("bf16", 0.005, 0.1),
        ("muon", 0.0005, 0.006),
    ):  # both round to bf16, and sums are taken in another order
        assert curve(folder / name) == pytest.approx(curve(single / name), rel=rel)
        assert curve(folder / name, "grad_norm") == pytest.approx(curve(single / name, "grad_norm"), rel=rel_norm)


def test_data_parallel(single, shards, tmp_path):
    done = launch(configuration("ddp", tmp_path, 2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert process["model"] == "DistributedDataParallel" and process["world"] == 2
    assert "ddp on 2 process(es), cpu" in done.stdout


def assert_sharded(process, shards):
    assert process["dtensors"] == process["parameters"] and process["dtypes"] == ["torch.float32"]
    assert process["held"] == pytest.approx(process["total"] / shards, rel=0.05) and process["began_on_meta"]
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


def assert_tensor_parallel(process, dp_shards, tp_size):
    """Matrices are in ``dp_shards * tp_size`` shards; norms and biases of the residual stream in ``dp_shards``."""
    assert process["held"] < 1.15 * process["total"] / (dp_shards * tp_size) and process["began_on_meta"]
    assert process["loss"] == ["torch.float32"]


def test_tensor_parallel(single, shards, tmp_path):
    done = launch(configuration("tp", tmp_path, 2, tp_size=2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_tensor_parallel(process, 1, 2)
            assert process["meshes"] == ["[0, 1]"] and "(Shard(dim=1),)" in process["placements"]
    assert "tp on 2 process(es), tp 2, cpu" in done.stdout


@pytest.mark.slow
def test_fully_sharded_and_tensor_parallel(single, shards, tmp_path):
    config = configuration("fsdp2_tp", tmp_path, 4, dp_shard_size=2, tp_size=2)
    done = launch(config, *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_tensor_parallel(process, 2, 2)
            assert (
                "[[0, 1], [2, 3]]" in process["meshes"] and len(process["meshes"]) == 2
            )  # norms are sharded over dp_shard only
    assert "fsdp2 x tp on 4 process(es), dp_shard 2 x tp 2, cpu" in done.stdout


def test_context_parallel(single, shards, tmp_path):
    done = launch(configuration("fsdp2_cp", tmp_path, 2, dp_shard_size=1, cp_size=2), *runs(tmp_path, shards))
    check(tmp_path, single)
    for style in ("gpt2", "modern", "bf16"):
        for process in facts(tmp_path / style):
            assert_sharded(process, 2)
            assert process["seq_lengths"] == [16] and process["meshes"] == ["[0, 1]"]  # half of each sequence
    assert "fsdp2 x cp on 2 process(es), cp 2, cpu" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp_shard", "tp"])
def test_context_parallel_with_other_parallelism(name, single, shards, tmp_path):
    config = configuration("fsdp2_cp", tmp_path, 4, **{"dp_shard_size": 1, f"{name}_size": 2, "cp_size": 2})
    done = launch(config, *runs(tmp_path, shards))
    check(tmp_path, single)
    for process in facts(tmp_path / "modern"):
        assert process["seq_lengths"] == [16] and process["began_on_meta"]
        assert process["held"] < 1.15 * process["total"] / 4
        assert ("[0, 1, 2, 3]" if name == "dp_shard" else "[[0, 1], [2, 3]]") in process["meshes"]
    expected = (
        "fsdp2 x cp on 4 process(es), dp_shard 2 x cp 2" if name == "dp_shard" else "fsdp2 x cp x tp on 4 process(es)"
    )
    assert expected in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), MONITORED)
def test_samples_and_benchmarks_on_two_processes_change_no_bit(name, sizes, shards, tmp_path):
    monitoring = ["--training.sample_every", "4", "--training.benchmark_every", "5", "--training.benchmark_limit", "6"]
    monitored = arguments(tmp_path / "monitored", shards, "modern", 10, *monitoring, *write_task(tmp_path / "tasks"))
    launch(configuration(name, tmp_path, 2, **sizes), monitored, arguments(tmp_path / "plain", shards, "modern", 10))
    assert all(process["world"] == 2 for process in facts(tmp_path / "monitored"))
    assert curve(tmp_path / "monitored") == curve(tmp_path / "plain")
    assert len((tmp_path / "monitored" / "samples.jsonl").read_text().splitlines()) == 3
    scores = [event["scores"] for event in read_events(tmp_path / "monitored" / "metrics.jsonl")]
    assert [one["was_or_saw"]["acc"] for one in scores] == [0.5, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [strategy for strategy in MONITORED if strategy[0] != "tp"])
def test_compiled_and_recomputed_blocks_give_the_run_of_one_eager_process(name, sizes, single, shards, tmp_path):
    compiled = arguments(tmp_path / "compiled", shards, "modern", STEPS, *RECOMPUTE, "--training.compile", "on")
    done = launch(configuration(name, tmp_path, 2, **sizes), compiled, timeout=900)
    assert "2 of 2 blocks recomputed, 2 compiled" in done.stdout
    assert all(process["world"] == 2 and process["graphs"] > 0 for process in facts(tmp_path / "compiled"))
    assert_same_run(single / "modern", tmp_path / "compiled", STEPS)


@pytest.mark.slow
def test_shards_offloaded_to_the_cpu_give_the_same_run(single, shards, tmp_path):
    launch(configuration("fsdp2", tmp_path, 2, offload=True), *runs(tmp_path, shards))
    check(tmp_path, single)
    for process in facts(tmp_path / "modern"):
        assert_sharded(process, 2)
        assert process["offload"] == ["CPUOffloadPolicy"]
