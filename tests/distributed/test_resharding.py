"""A checkpoint does not depend on the strategy: each resumes from every other."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launch import (
    alone,
    arguments,
    assert_only_local_shards_were_read,
    assert_same_run,
    configuration,
    curve,
    facts,
    launch,
)

HALF, STEPS = 6, 12
CONSTANT = ["--training.schedule", "constant", "--training.save_every", "3", "--training.eval_every", "3"]
DROPOUT = ["--model.overrides.hidden_dropout", "0.2", "--training.activation_checkpointing", "full"]


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fsdp2", "others"])
def test_a_run_resumes_with_another_strategy_and_number_of_processes(shards, tmp_path, others):
    def run(name, steps, *more):
        return arguments(tmp_path / name, shards, "gpt2", steps, *CONSTANT, *more)

    alone(run("single", STEPS), run("1 to 2", HALF))
    done = launch(
        configuration("fsdp2", tmp_path, 2),
        run("uninterrupted", STEPS, *DROPOUT),
        run("interrupted", HALF, *DROPOUT),
        run("interrupted", STEPS, *DROPOUT),
        run("1 to 2", STEPS),
        run("half", HALF),
    )
    assert "resumed    checkpoint-6: 6 of 12 steps are done" in done.stdout
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(tmp_path / "interrupted", key) == curve(tmp_path / "uninterrupted", key), key  # bit for bit

    for name in ("checkpoint-3", "checkpoint-6", "final"):  # plain models, though the run was sharded
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / name)
        assert type(model).__name__ == "ScratchGPTForCausalLM" and model.dtype == torch.float32
        assert model.config.architectures == ["ScratchGPTForCausalLM"]

    shutil.copytree(tmp_path / "half", tmp_path / "2 to 1")
    alone(run("2 to 1", STEPS))
    for name in ("interrupted", "1 to 2"):
        assert_only_local_shards_were_read(tmp_path / name)
    for name in ("1 to 2", "2 to 1"):
        assert_same_run(tmp_path / "single", tmp_path / name, STEPS)
    if not others:
        return
    for name in ("2 to 4", "2 to ddp"):
        shutil.copytree(tmp_path / "half", tmp_path / name)
    launch(configuration("hsdp", tmp_path, 4, dp_replicate_size=2, dp_shard_size=2), run("2 to 4", STEPS))
    launch(configuration("ddp", tmp_path, 2), run("2 to ddp", STEPS - 3))
    assert facts(tmp_path / "2 to 4")[3]["placements"] == ["(Replicate(), Shard(dim=0))"]
    alone(run("2 to ddp", STEPS))
    assert_only_local_shards_were_read(tmp_path / "2 to 4")
    for name in ("2 to 4", "2 to ddp"):
        assert_same_run(tmp_path / "single", tmp_path / name, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "seq_length"), [("fsdp2_cp", {"dp_shard_size": 1, "cp_size": 2}, 16), ("tp", {"tp_size": 2}, 32)]
)
def test_a_model_parallel_run_resumes_bit_for_bit_and_in_one_process(name, sizes, seq_length, shards, tmp_path):
    def run(name, steps, *more):
        return arguments(tmp_path / name, shards, "modern", steps, *CONSTANT, "--training.document_mask", "true", *more)

    launch(
        configuration(name, tmp_path, 2, **sizes),
        run("uninterrupted", STEPS, *DROPOUT),
        run("interrupted", HALF, *DROPOUT),
        run("interrupted", STEPS, *DROPOUT),
        run("2 to 1", HALF),
    )
    assert facts(tmp_path / "interrupted")[0]["seq_lengths"] == [seq_length]
    assert_only_local_shards_were_read(tmp_path / "interrupted")
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(tmp_path / "interrupted", key) == curve(tmp_path / "uninterrupted", key), key
    alone(run("2 to 1", STEPS), run("single", STEPS))
    assert_same_run(tmp_path / "single", tmp_path / "2 to 1", STEPS)
