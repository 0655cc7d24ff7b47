"""The stages on two processes under `accelerate launch`, copied and sharded: what one process learns."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scratch_gpt.alignment.resume import Resumable
from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_metrics
from tests.alignment.test_stages import pairs, words  # noqa: F401 (a fixture)
from tests.distributed.launch import alone, configuration, launch

PROGRAM = ("-m", "tests.alignment.test_stage_processes")
RUNS = {
    "sft": words("sft", run_dir="sft", save_every=3),
    "lora": words("sft", "--lora-rank", 4, run_dir="lora", save_every=3),
    "dpo": words("dpo", "--dpo.device_batch_size", 2, save_every=3),
    "reward": words("reward", save_every=3),
    "reward-lora": words("reward", "--lora-rank", 4, run_dir="reward-lora", save_every=3),
}


def train(trainer, *arguments, original=Resumable.train, **keywords):
    """Note beside the metrics what was in force when the training ended."""
    result = original(trainer, *arguments, **keywords)
    parameters = list(trainer.model.parameters())
    held = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    facts = {
        "parallel": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "sharded": sum(isinstance(p, DTensor) for p in parameters) / len(parameters),
        "held": sum(p.numel() for p in held) / sum(p.numel() for p in parameters),
    }
    Path(trainer.args.output_dir, f"facts-{trainer.args.process_index}.json").write_text(json.dumps(facts))
    return result


def curve(run_dir, key):
    return [record[key] for record in read_metrics(Path(run_dir) / "metrics.jsonl") if key in record]


def assert_same(one, other):
    for key in ("loss", "grad_norm", "tokens", "learning_rate"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=1e-3), key
    assert len(curve(other, "loss")) == 6
    for file in ("final/model.safetensors", "checkpoint-6/trainer_state/optimizer.safetensors"):
        expected, got = load_file(Path(one) / file), load_file(Path(other) / file)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert (tensor - got[name]).abs().max() <= 2e-3 * tensor.abs().max().clamp(min=0.01), (file, name)


def in_processes(layout, *runs):
    done = launch(configuration(layout, Path(), 2), *runs, program=PROGRAM, folder=Path())
    return done.stdout


def under(run, layout):
    return [word if run[at - 1] != "--run-dir" else f"{word}-{layout}" for at, word in enumerate(run)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp_cpu", "fsdp2"])
def test_two_processes_learn_what_one_learns_and_leave_the_same_model(pairs, layout):  # noqa: F811
    alone(*RUNS.values())
    in_processes(layout, *(under(run, layout) for run in RUNS.values()))
    for name, run in RUNS.items():
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-{layout}")
        facts = [json.loads(Path(f"{directory}-{layout}/facts-{rank}.json").read_text()) for rank in range(2)]
        if layout == "fsdp2":
            assert all(of_one["sharded"] == 1 and of_one["held"] < 0.6 for of_one in facts), name
        else:
            assert all(of_one["parallel"] and of_one["sharded"] == 0 for of_one in facts), name


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(pairs):  # noqa: F811
    alone(RUNS["sft"])
    for layout in ("fsdp2", "ddp_cpu"):
        shutil.copytree("sft", f"sft-{layout}")
        for gone in ("checkpoint-6", "final"):
            shutil.rmtree(f"sft-{layout}/{gone}")
        assert "checkpoint-3" in in_processes(layout, under(RUNS["sft"], layout))
        assert_same("sft", f"sft-{layout}")
    for gone in ("checkpoint-6", "final"):
        shutil.rmtree(f"sft-fsdp2/{gone}")
    alone(under(RUNS["sft"], "fsdp2"))  # whose checkpoint-3 is still that of one process
    assert_same("sft", "sft-fsdp2")


if __name__ == "__main__":
    Resumable.train = train
    torch.set_num_threads(1)
    sys.exit(max(main(run) for run in json.loads(sys.argv[1])))
