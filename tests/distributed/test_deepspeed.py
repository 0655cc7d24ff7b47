"""ZeRO through DeepSpeed gives the run of a single process, is sharded as its stage says, and resumes with any strategy."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scratch_gpt.training.metrics import read_events
from scratch_gpt.training.spike_guard import SpikeGuard
from tests.distributed.launch import alone, arguments, assert_same_run, configuration, curve, facts, launch
from tests.distributed.spoilt import SPOILT, problem
from tests.training.test_monitor import write_task

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'scratch-gpt[deepspeed]'"
)
PROGRAM = ("-m", "tests.distributed.deepspeed_program")
STEPS = 20
RECOMPUTE = ["--training.activation_checkpointing", "full", "--training.device_batch_size", "2"]
RUNS = {"gpt2": [], "modern": RECOMPUTE, "bf16": ["--training.precision", "bf16"]}
PADDING = 64
"""Padding elements at the end of a rank's flat buffer, at most."""
FLOAT32 = 4


def half(total):
    return range(total // 2, total // 2 + PADDING)


@pytest.fixture(scope="module")
def single(tmp_path_factory, shards):
    """The runs of one process, without recomputation and in one micro-batch, in one folder each."""
    folder = tmp_path_factory.mktemp("single")
    for name in ("gpt2", "modern"):
        alone(arguments(folder / name, shards, name, STEPS))
    alone(arguments(folder / "bf16", shards, "modern", STEPS, *RUNS["bf16"]))
    return folder


@pytest.mark.parametrize(
    ("name", "stage", "runs"),
    [
        ("zero1", 1, ("gpt2", "modern")),
        pytest.param("zero2", 2, RUNS, marks=pytest.mark.slow),
        ("zero3", 3, RUNS),
        pytest.param("zero3_offload", 3, RUNS, marks=pytest.mark.slow),
    ],
)
def test_a_stage_of_zero_on_two_processes_gives_the_run_of_one(name, stage, runs, single, shards, tmp_path):
    def run(which):
        return arguments(tmp_path / which, shards, "modern" if which == "bf16" else which, STEPS, *RUNS[which])

    done = launch(configuration(name, tmp_path, 2), *map(run, runs), ["doctor"], program=PROGRAM)
    for style in ("gpt2", "modern"):
        assert_same_run(single / style, tmp_path / style, STEPS)
    if "bf16" in runs:
        for key, rel in (("loss", 0.005), ("grad_norm", 0.06)):  # rounded to bf16, and sums are taken in another order
            assert curve(tmp_path / "bf16", key) == pytest.approx(curve(single / "bf16", key), rel=rel)

    for which in runs:
        for process in facts(tmp_path / which):
            total = process["total"]
            assert process["model"] == "DeepSpeedEngine" and process["stage"] == stage and process["world"] == 2
            assert process["reduced"] == ["torch.float32"] and process["loss"] == ["torch.float32"]
            assert process["state_bytes"] // (2 * FLOAT32) in half(total)  # of AdamW's two moments
            assert process["offload"] == [False, *[name == "zero3_offload"] * 2]
            if stage == 3:
                assert process["weights"] == 0 and process["parts"] in half(total) and process["began_on_meta"]
            else:
                assert process["weights"] == total and process["parts"] == 0
            if which == "modern":  # the gradients that are held between micro-batches
                assert process["gradients"] == [total] if stage == 1 else set(process["gradients"]) <= set(half(total))
    assert done.stdout.count(f"zero{stage} on 2 process(es), cpu, DeepSpeed ") == len(runs) + 1  # and the doctor
    assert done.stdout.count("rank 0 on") == done.stdout.count("rank 1 on") == 1
    sharded = "24 of 24 parameters sharded, 49,328" if stage == 3 else "0 of 24 parameters sharded, 98,656"
    assert "each process updates 49,328 weights, padding included, in " in done.stdout
    assert f"each: {sharded} of 98,656 weights held; float32, gradients reduced in float32" in done.stdout


HALF, FULL = 6, 12
CONSTANT = ["--training.schedule", "constant", "--training.save_every", "3", "--training.eval_every", "3"]
DROPOUT = ["--model.overrides.hidden_dropout", "0.2", *RECOMPUTE]
MONITORING = ["--training.sample_every", "4", "--training.benchmark_every", "5", "--training.benchmark_limit", "6"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_run_resumes_bit_for_bit_and_with_other_strategies_and_survives_bad_steps(
    name, shards, tmp_path, monkeypatch
):
    def run(which, steps, *more):
        return arguments(tmp_path / which, shards, "gpt2", steps, *CONSTANT, *more)

    monkeypatch.setattr(SpikeGuard, "problem", problem)
    compiled = ["--training.compile", "on"]
    alone(run("single", FULL), run("1 to 2", HALF, *compiled), run("spoilt in one", FULL, *SPOILT))
    done = launch(
        configuration(name, tmp_path, 2),
        run("uninterrupted", FULL, *DROPOUT),
        run("interrupted", HALF, *DROPOUT),
        run("interrupted", FULL, *DROPOUT, *MONITORING, *write_task(tmp_path / "tasks")),
        run("1 to 2", FULL, *compiled),
        run("half", HALF),
        run("spoilt", FULL, *SPOILT),
        program=PROGRAM,
    )
    assert "resumed    checkpoint-6: 6 of 12 steps are done" in done.stdout
    assert ("except that zero3 cannot compile blocks" in done.stdout) == (name == "zero3")
    of_checkpoint = 3 if name == "zero3" else 2  # weights, if they are sharded, and AdamW's two moments
    processes = facts(tmp_path / "1 to 2")
    assert all((process["graphs"] > 0) == (name == "zero2") for process in processes)
    assert sum(process["read"] for process in processes) == of_checkpoint * processes[0]["total"]
    assert all(process["read"] <= of_checkpoint * max(half(process["total"])) for process in processes)
    for key in ("loss", "grad_norm", "validation_loss"):  # bit for bit, also with samples and benchmarks in between
        assert curve(tmp_path / "interrupted", key) == curve(tmp_path / "uninterrupted", key), key
    scored = [event for event in read_events(tmp_path / "interrupted" / "metrics.jsonl") if "scores" in event]
    assert [event["scores"]["was_or_saw"]["acc"] for event in scored] == [0.5, 0.5]
    for file in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        one, other = (
            load_file(tmp_path / which / f"checkpoint-{FULL}" / file) for which in ("uninterrupted", "interrupted")
        )
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())

    for checkpoint in ("checkpoint-3", "checkpoint-6", "final"):  # plain models
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / checkpoint)
        assert type(model).__name__ == "ScratchGPTForCausalLM" and model.dtype == torch.float32

    shutil.copytree(tmp_path / "half", tmp_path / "2 to 1")
    shutil.copytree(tmp_path / "half", tmp_path / "2 to fsdp2")
    alone(run("2 to 1", FULL))
    launch(configuration("fsdp2", tmp_path, 2), run("2 to fsdp2", FULL))
    assert facts(tmp_path / "2 to fsdp2")[0]["dtensors"] == facts(tmp_path / "2 to fsdp2")[0]["parameters"]
    for which in ("1 to 2", "2 to 1", "2 to fsdp2"):
        assert_same_run(tmp_path / "single", tmp_path / which, FULL)

    events = [[event["event"] for event in read_events(tmp_path / which / "metrics.jsonl")] for which in SPOILT_RUNS]
    assert events == [["skipped", "skipped", "skipped", "rolled back"]] * 2
    assert_same_run(tmp_path / "spoilt in one", tmp_path / "spoilt", FULL)


SPOILT_RUNS = ("spoilt in one", "spoilt")
