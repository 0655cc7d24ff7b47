"""Runs whose model is a pipeline equal those of one process, and each resumes from the other's checkpoints."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from scratch_gpt.training.metrics import read_events
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

STEPS = 20
FOUR_BLOCKS = ["--model.num_hidden_layers", "4", "--training.save_every", "5", "--training.keep_last", "10"]
RECOMPUTE = ["--training.activation_checkpointing", "full"]
DROPOUT = ["--model.overrides.hidden_dropout", "0.1", "--model.overrides.embedding_dropout", "0.1"]


def pipeline(size, num_micro_batches, schedule="1f1b"):
    words = ["--parallel.pipeline", size, "--parallel.pipeline_microbatches", num_micro_batches]
    return [str(word) for word in [*words, "--parallel.pipeline_schedule", schedule]]


def run(folder, shards, style, *more):
    mask = ["--training.document_mask", str(style == "modern").lower()]
    return arguments(folder, shards, style, STEPS, *FOUR_BLOCKS, *mask, *more)


def weights(run_dir):
    return load_file(run_dir / "final" / "model.safetensors")


def forget(run_dir, steps):
    """Reduce a finished run to what a kill after ``steps`` steps would leave."""
    shutil.rmtree(run_dir / "final")
    for folder in run_dir.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > steps:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("single")
    for style in ("gpt2", "modern"):
        alone(run(folder / style, shards, style))
    return folder


@pytest.fixture(scope="module")
def two(single, shards, tmp_path_factory):
    """The same runs on two processes, with two stages and with four."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = launch(
        configuration("pipeline", folder, 2),
        run(folder / "gpt2", shards, "gpt2", *pipeline(2, 4)),
        run(folder / "modern", shards, "modern", *pipeline(2, 4, "interleaved1f1b"), *RECOMPUTE),
    )
    return folder, done.stdout


def assert_pipeline(run_dir, size, stages, copies=1, shards=1):
    """Each rank has ``stages`` stages, and the ``size`` ranks of a pipeline have the model's weights between them."""
    processes = facts(run_dir)
    assert len(processes) == size * copies * shards
    assert all(process["model"] == "Pipeline" and process["stages"] == stages for process in processes)
    sizes = {name: weight.numel() for name, weight in weights(run_dir).items()}
    tied = 0 if "lm_head.weight" in sizes else sizes["transformer.wte.weight"]  # at both ends
    assert sum(process["held"] for process in processes) == copies * (sum(sizes.values()) + tied)
    assert all(process["held"] < 0.9 * sum(sizes.values()) for process in processes)


def test_two_and_four_stages_give_the_run_of_one_process(single, two):
    folder, said = two
    for style, stages in (("gpt2", 1), ("modern", 2)):
        assert_same_run(single / style, folder / style, STEPS)
        assert_pipeline(folder / style, size=2, stages=stages)
    assert "pipeline on 2 process(es), pipeline 2 x data 1, cpu, 1f1b" in said
    assert "stage 3 on pipeline rank 1: block 3, head and loss" in said and "2 of 2 blocks recomputed" in said


def test_a_killed_pipeline_resumes_bit_for_bit_and_checkpoints_fit_any_strategy(single, two, shards, tmp_path):
    folder, _ = two
    for style in ("gpt2", "modern"):
        for origin, name in ((folder, "killed"), (folder, "alone"), (single, "resharded")):
            shutil.copytree(origin / style, tmp_path / f"{style} {name}")
            forget(tmp_path / f"{style} {name}", steps=10)
    gpt2, modern = pipeline(2, 4), [*pipeline(2, 4, "interleaved1f1b"), *RECOMPUTE]
    launch(
        configuration("pipeline", tmp_path, 2),
        run(tmp_path / "gpt2 killed", shards, "gpt2", *gpt2),
        run(tmp_path / "gpt2 resharded", shards, "gpt2", *gpt2),
        run(tmp_path / "modern killed", shards, "modern", *modern),
    )
    alone(run(tmp_path / "gpt2 alone", shards, "gpt2"))
    for name in ("gpt2 killed", "gpt2 resharded", "modern killed"):
        assert_only_local_shards_were_read(tmp_path / name)
    for style in ("gpt2", "modern"):
        for key in ("loss", "grad_norm", "validation_loss"):
            assert curve(tmp_path / f"{style} killed", key) == curve(folder / style, key)
        killed, whole = weights(tmp_path / f"{style} killed"), weights(folder / style)
        assert killed.keys() == whole.keys() and all(torch.equal(killed[name], whole[name]) for name in whole)
    assert_same_run(single / "gpt2", tmp_path / "gpt2 resharded", STEPS)
    assert_same_run(single / "gpt2", tmp_path / "gpt2 alone", STEPS)


@pytest.mark.slow
def test_four_processes_are_four_stages_or_two_pipelines(single, shards, tmp_path):
    muon = ["--training.optimizer", "muon"]
    alone(run(tmp_path / "muon", shards, "modern", *muon))
    launch(
        configuration("pipeline", tmp_path, 4),
        run(tmp_path / "four gpt2", shards, "gpt2", *pipeline(4, 8)),
        run(tmp_path / "four modern", shards, "modern", *pipeline(4, 4), *RECOMPUTE),
        run(tmp_path / "two gpt2", shards, "gpt2", *pipeline(2, 2, "interleaved1f1b"), *RECOMPUTE),
        run(tmp_path / "two modern", shards, "modern", *pipeline(2, 4)),
        run(tmp_path / "two muon", shards, "modern", *pipeline(2, 4), *muon),
    )
    for style in ("gpt2", "modern"):
        for name in ("four", "two"):
            assert_same_run(single / style, tmp_path / f"{name} {style}", STEPS)
    # Muon orthogonalizes in bfloat16, where the last bit of a gradient can move an update.
    assert_same_run(tmp_path / "muon", tmp_path / "two muon", STEPS, rel=2e-3, weights=0.1)
    for style in ("gpt2", "modern"):
        assert_pipeline(tmp_path / f"four {style}", size=4, stages=1)
    assert_pipeline(tmp_path / "two gpt2", size=2, stages=2, copies=2)
    assert_pipeline(tmp_path / "two muon", size=2, stages=1, copies=2)


def assert_sharded_stages(run_dir, stages):
    """A pipeline of two ranks, the stages of each sharded over two processes."""
    assert_pipeline(run_dir, size=2, stages=stages, copies=1, shards=2)
    for rank, process in enumerate(facts(run_dir)):
        assert process["dtensors"] == process["parameters"] and process["placements"] == ["(Shard(dim=0),)"]
        assert process["meshes"] == ["[0, 1]" if rank < 2 else "[2, 3]"] and process["began_on_meta"]
        assert process["held"] == process["total"] / 2 and process["reduced"] == ["torch.float32"]


SHARDED_STAGES = {"gpt2": pipeline(2, 4), "modern": [*pipeline(2, 4, "interleaved1f1b"), *RECOMPUTE]}


@pytest.mark.slow
def test_pipelines_with_sharded_stages_give_the_run_of_one_process(single, shards, tmp_path):
    config = configuration("pipeline_fsdp2", tmp_path, 4)
    done = launch(config, *(run(tmp_path / style, shards, style, *SHARDED_STAGES[style]) for style in SHARDED_STAGES))
    for style, stages in (("gpt2", 1), ("modern", 2)):
        assert_same_run(single / style, tmp_path / style, STEPS)
        assert_sharded_stages(tmp_path / style, stages)
    assert "pipeline x fsdp2 on 4 process(es), pipeline 2 x dp_shard 2, cpu, 1f1b" in done.stdout


@pytest.mark.slow
def test_checkpoints_of_sharded_stages_resume_bit_for_bit_and_in_any_layout(single, shards, tmp_path):
    muon, bf16 = ["--training.optimizer", "muon"], ["--training.precision", "bf16"]
    alone(run(tmp_path / "one muon", shards, "modern", *muon), run(tmp_path / "one bf16", shards, "modern", *bf16))
    shutil.copytree(single / "modern", tmp_path / "resharded")
    forget(tmp_path / "resharded", steps=10)
    config = configuration("pipeline_fsdp2", tmp_path, 4)
    settings = yaml.safe_load(config.read_text())
    settings["fsdp_config"]["fsdp_reshard_after_forward"] = True  # gathered for each micro-batch
    config.write_text(yaml.safe_dump(settings))
    launch(
        config,
        run(tmp_path / "gpt2", shards, "gpt2", *SHARDED_STAGES["gpt2"], *DROPOUT),
        run(tmp_path / "modern", shards, "modern", *SHARDED_STAGES["modern"]),
        run(tmp_path / "resharded", shards, "modern", *pipeline(2, 2)),
        run(tmp_path / "muon", shards, "modern", *pipeline(2, 4), *muon),
        run(tmp_path / "bf16", shards, "modern", *pipeline(2, 4), *bf16),
    )
    for name in ("gpt2", "modern"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name} killed")
        forget(tmp_path / f"{name} killed", steps=10)
    shutil.copytree(tmp_path / "resharded", tmp_path / "alone")
    forget(tmp_path / "alone", steps=15)
    launch(
        config,
        run(tmp_path / "gpt2 killed", shards, "gpt2", *SHARDED_STAGES["gpt2"], *DROPOUT),
        run(tmp_path / "modern killed", shards, "modern", *SHARDED_STAGES["modern"]),
    )
    alone(run(tmp_path / "alone", shards, "modern"))
    for name in ("gpt2", "modern"):
        assert_only_local_shards_were_read(tmp_path / f"{name} killed")
        assert curve(tmp_path / f"{name} killed") == curve(tmp_path / name)
        whole = weights(tmp_path / name)
        assert all(torch.equal(weight, whole[key]) for key, weight in weights(tmp_path / f"{name} killed").items())
    for name in ("modern", "resharded", "alone"):
        assert_same_run(single / "modern", tmp_path / name, STEPS)
    assert_same_run(tmp_path / "one muon", tmp_path / "muon", STEPS, rel=2e-3, weights=0.1)
    assert curve(tmp_path / "bf16") == pytest.approx(curve(tmp_path / "one bf16"), rel=1e-3)
    assert_sharded_stages(tmp_path / "bf16", stages=1)


@pytest.mark.slow
def test_dropout_is_the_same_recomputed_and_after_a_kill(shards, tmp_path):
    config = configuration("pipeline", tmp_path, 2)
    kept, again, killed = (tmp_path / name for name in ("kept", "again", "killed"))
    launch(
        config,
        run(kept, shards, "gpt2", *pipeline(2, 4), *DROPOUT),
        run(again, shards, "gpt2", *pipeline(2, 4), *DROPOUT, *RECOMPUTE),
    )
    assert curve(again) == pytest.approx(curve(kept), rel=1e-5)
    assert curve(again, "grad_norm") == pytest.approx(curve(kept, "grad_norm"), rel=1e-4)
    shutil.copytree(kept, killed)
    forget(killed, steps=10)
    launch(config, run(killed, shards, "gpt2", *pipeline(2, 4), *DROPOUT))
    assert curve(killed) == curve(kept)
    assert all(torch.equal(weight, weights(killed)[name]) for name, weight in weights(kept).items())


TROUBLE = """
import json, math, os, signal, sys, torch
from scratch_gpt.cli import leave, main
from scratch_gpt.training.trainer import Trainer

def forward_backward(self, data, original=Trainer.forward_backward):
    loss = original(self, data)
    if self.strategy.rank == 1 and data.cursor.row == 3 * 8:
        next(self.model.parameters()).grad.fill_(math.inf)
    if self.strategy.rank == 1 and self.state.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss

Trainer.forward_backward = forward_backward
(run,) = json.loads(sys.argv[1])
leave(main(run))
"""


@pytest.mark.slow
def test_what_happens_on_one_stage_is_agreed_by_all(shards, tmp_path):
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE)
    folder = tmp_path / "run"
    done = launch(
        configuration("pipeline", tmp_path, 2),
        run(folder, shards, "modern", *pipeline(2, 4)),
        check=False,
        program=(str(script),),
    )
    assert "stopped after step 7 of 20, saved in" in done.stdout + done.stderr
    assert "exitcode  : 75" in done.stderr
    assert [(event["event"], event["step"]) for event in read_events(folder / "metrics.jsonl")] == [("skipped", 3)]
    assert "the gradient norm is inf" in done.stdout
    assert (folder / "checkpoint-7" / "trainer_state" / "complete.json").is_file()
