"""`scratch-gpt ppo` on the command line."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_metrics


def arguments(*more, run_dir="run", reward="rewards_of_test:vowels", steps=32):
    given = [] if reward is None else ["--reward", reward]
    given = ["ppo", "--model", "base", *given, "--data", "prompts.jsonl", "--run-dir", run_dir]
    given += ["--validation-data", "held_out.jsonl", "--plain-text", "continue"]
    given += ["--max-steps", steps, "--ppo.mini_batch_size", 8, "--ppo.max_completion_length", 8]
    return [str(word) for word in [*given, "--ppo.learning_rate", "3e-3", "--ppo.save_every", 8, *more]]


def weights(folder):
    return load_file(folder / "model.safetensors")


def training_records(folder):
    """The records of training."""
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def without_times(records):
    return [
        {name: value for name, value in record.items() if name not in ("time", "tokens_per_second")}
        for record in records
    ]


def test_run_saves_a_plain_model_and_does_nothing_when_repeated(material, capsys):
    validation = ["--ppo.eval_every", "16"]
    assert main(arguments(*validation)) == 0
    final = material / "run" / "final"
    assert {file.name for file in final.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_scratch_gpt.py",
        "tokenizer.json",
    }
    assert not torch.equal(weights(final)["lm_head.weight" if "lm_head.weight" in weights(final) else "transformer.wte.weight"],
                           weights(material / "base")["transformer.wte.weight"])  # fmt: skip
    AutoModelForCausalLM.from_pretrained(final)
    card = (final / "README.md").read_text()
    records = training_records(material / "run")
    assert [record["step"] for record in records] == [8, 16, 24, 32]
    assert f"| {records[0]['objective/scores']:.3f} | {records[-1]['objective/scores']:.3f} |" in card
    output = capsys.readouterr().out
    assert "rollouts   4 of 16 completions" in output
    assert output.count("validation score") == 2 and "ended" in output
    assert main(arguments(*validation)) == 0
    assert "is finished (32 steps)" in capsys.readouterr().out
    assert main(arguments("--seed", "2")) == 2
    assert "seed is 1337 there and 2 here" in capsys.readouterr().err


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_resume_after_a_signal_equals_the_uninterrupted_run(material, end, capsys):
    """SIGTERM saves and exits with 75; after SIGKILL the last checkpoint is used."""
    assert main(arguments(run_dir="full", steps=48)) == 0
    command = [sys.executable, "-m", "scratch_gpt"]
    every = 1000 if end == signal.SIGTERM else 8  # with SIGTERM it saves although no checkpoint is due
    slow = arguments("--ppo.save_every", every, run_dir="ended", steps=48, reward="rewards_of_test:slow")
    process = subprocess.Popen([*command, *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(material / "ended" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(end)
    _, errors = process.communicate()
    if end == signal.SIGTERM:
        assert process.returncode == 75 and "Run the same command again" in errors
    assert len(read_metrics(material / "ended" / "metrics.jsonl")) < 6 and not (material / "ended" / "final").exists()
    capsys.readouterr()
    assert main(slow) == 0
    assert "of 48 steps are done" in capsys.readouterr().out
    ended, full = (weights(material / name / "final") for name in ("ended", "full"))
    assert all(torch.equal(tensor, full[name]) for name, tensor in ended.items())
    ended, full = (without_times(read_metrics(material / name / "metrics.jsonl")) for name in ("ended", "full"))
    assert ended == full


def test_a_damaged_checkpoint_is_skipped(material, capsys):
    assert main(arguments(run_dir="full", steps=32)) == 0
    assert main(arguments(run_dir="cut", steps=16)) == 0
    state = material / "cut" / "checkpoint-16" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    capsys.readouterr()
    assert main(arguments(run_dir="cut", steps=32)) == 0
    output = capsys.readouterr().out
    assert "checkpoint-16 is not used: trainer_state.json is damaged" in output
    assert "checkpoint-8: 8 of 32 steps are done" in output
    assert [record["step"] for record in training_records(material / "cut")] == [8, 16, 24, 32]


def test_reward_model_and_merged_adapters(material):
    """final/ is a plain model; only weights with adapters differ from the base model's."""
    run = arguments("--reward-model", "judge", "--lora-rank", 2, reward=None, steps=16)
    assert main(run) == 0
    before, after = weights(material / "base"), weights(material / "run" / "final")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reward": None}, "give either --reward-model FOLDER or --reward MODULE:FUNCTION"),
        (
            {"steps": 30},
            "a rollout takes 8 steps (ppo.num_ppo_epochs x ppo.num_mini_batches), so give a multiple of that, such as 32",
        ),
        ({"reward": "rewards_of_test:nothing"}, "give MODULE:FUNCTION"),
        ({"reward": "no_such_module:f"}, "cannot import no_such_module here"),
        ({"reward": "rewards_of_test:broken"}, "broken raised IndexError: string index out of range"),
        (["--ppo.device_batch_size", 3], "it must be a multiple of 3 (device_batch_size) x 1 (data-parallel ranks)"),
        (["--data", "none.jsonl"], "there is no file none.jsonl"),
        (["--data", "bad.jsonl"], "bad.jsonl, row 2: its columns are text, but this command takes prompt; instruction"),
        (["--data", "mixed.jsonl"], "mixed.jsonl: plain texts and messages are mixed"),
        (["--ppo.max_completion_length", 64], "the model's whole context 64 tokens"),
        (["--ppo.temperature", 0], "temperature is 0"),
        (["--model", "nothing"], "there is no model nothing"),
    ],
)
def test_mistakes_exit_with_one_message(material, capsys, more, message):
    (material / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (material / "mixed.jsonl").write_text('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    words = arguments(**more) if isinstance(more, dict) else arguments(*more)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_run_of_another_command_is_not_touched(material, capsys):
    (material / "run").mkdir()
    (material / "run" / "config.yaml").write_text("training: {learning_rate: 0.1}\n")
    assert main(arguments("--fresh")) == 2
    assert "holds a run of another command" in capsys.readouterr().err
