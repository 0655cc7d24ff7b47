"""The recipes SFT, reward model, DPO, KTO, GRPO and RLOO, run as commands."""

import importlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import pack_dataset

from scratch_gpt.alignment import grpo, recipe, sft
from scratch_gpt.alignment.data.chat_template import encode_prompt_completion
from scratch_gpt.alignment.data.dataset_types import prompt_completion
from scratch_gpt.alignment.sft import encode
from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_metrics

ROWS = [
    {"prompt": f"Who is {name}?", "chosen": f"{name} is a friend.", "rejected": f"I do not know {name} at all."}
    for name in ("Ann", "Bess", "Cleo", "Dora", "Emma", "Fay", "Gwen", "Hope")
]
PARALLELISM = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
COMMANDS = ("sft", "reward", "dpo", "kto", "grpo", "rloo")


@pytest.fixture
def pairs(material):
    """The current folder, with the models of `material`, pairs.jsonl and held_pairs.jsonl."""
    for name, rows in (("pairs", ROWS), ("held_pairs", ROWS[:3])):
        (material / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return material


def command_line(command, *more, steps=6, run_dir=None, **settings):
    """The words of a command for a short run; ``settings``: of the recipe's own group."""
    words = [command, "--model", "base", "--data", "pairs.jsonl", "--validation-data", "held_pairs.jsonl"]
    words += ["--run-dir", run_dir or command, "--max-steps", steps]
    group = {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 1, "eval_every": 6, "save_every": 2, **settings}
    if command in ("grpo", "rloo"):
        group = {**group, "num_generations": 4, "max_completion_length": 8, "batch_size": 8}
        words += ["--reward", "rewards_of_test:vowels_said"]
    for name, value in group.items():
        words += [f"--{command}.{name}", value]
    return [str(word) for word in [*words, *more]]


def without_times(folder):
    """The records of metrics.jsonl without the values that depend on the machine's speed."""
    records = read_metrics(folder / "metrics.jsonl")
    timing = ("time", "tokens_per_second", "step_time")
    return [
        {name: value for name, value in record.items() if not name.endswith(timing) and "_runtime" not in name
         and "per_second" not in name}
        for record in records
    ]  # fmt: skip


def training_records(folder):
    """The records of metrics.jsonl that are of training steps, not of evaluations."""
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_writes_a_model_and_runs_only_once(pairs, capsys, command):
    assert main(command_line(command)) == 0
    run = pairs / command
    records = training_records(run)
    assert [record["step"] for record in records] == list(range(1, 7))
    contract = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "time"}
    assert all(contract <= record.keys() for record in records)
    assert [r["tokens"] for r in records] == sorted({r["tokens"] for r in records})
    assert {file.name for file in (run / "final").iterdir()} >= {
        "README.md", "config.json", "model.safetensors", "modeling_scratch_gpt.py", "tokenizer.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert {folder.name for folder in run.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert not list(run.rglob("training_args.bin"))
    before, after = (load_file(folder / "model.safetensors") for folder in (pairs / "base", run / "final"))
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    auto_class = AutoModelForSequenceClassification if command == "reward" else AutoModelForCausalLM
    saved = auto_class.from_pretrained(run / "final")
    assert saved.config.use_cache is True
    if command != "reward":
        end_of_turn = AutoTokenizer.from_pretrained(run / "final").convert_tokens_to_ids("<|im_end|>")
        assert end_of_turn in saved.generation_config.eos_token_id
    card = (run / "final" / "README.md").read_text()
    assert "6 optimizer steps, seed 1337" in card and "`pairs.jsonl`" in card
    capsys.readouterr()
    assert main(command_line(command)) == 0
    assert "is finished (6 steps)" in capsys.readouterr().out
    assert main(command_line(command, "--seed", "2")) == 2
    assert "seed is 1337 there and 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "end_signal"), [("dpo", signal.SIGTERM), ("sft", signal.SIGKILL), ("grpo", signal.SIGKILL)]
)
def test_an_interrupted_run_resumes_bit_for_bit(pairs, capsys, command, end_signal):
    """SIGTERM saves and exits with 75; after SIGKILL the newest complete checkpoint is used, and an incomplete one skipped."""
    more = ["--dpo.device_batch_size", 2] if command == "dpo" else []
    assert main(command_line(command, *more, steps=8, run_dir="uninterrupted")) == 0
    save_every = 1000 if end_signal == signal.SIGTERM else 2
    arguments = command_line(command, *more, steps=8, run_dir="interrupted", save_every=save_every)
    slow = f"import sys, time\nimport scratch_gpt.alignment.recipe as recipe\nfrom scratch_gpt.cli import main\n{SLOW}"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(read_metrics(pairs / "interrupted" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(end_signal)
    _, errors = process.communicate()
    if end_signal == signal.SIGTERM:
        assert process.returncode == 75 and "Run the same command again" in errors
    else:
        (pairs / "interrupted" / "checkpoint-4").mkdir(exist_ok=True)  # as if killed while saving
        (pairs / "interrupted" / "checkpoint-4" / "trainer_state" / "complete.json").unlink(missing_ok=True)
    assert not (pairs / "interrupted" / "final").exists()
    capsys.readouterr()
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "of 8 steps are done" in output
    assert end_signal == signal.SIGTERM or "checkpoint-4 is not used: it was not finished" in output
    assert without_times(pairs / "interrupted") == without_times(pairs / "uninterrupted")
    resumed, expected = (
        load_file(pairs / name / "final" / "model.safetensors") for name in ("interrupted", "uninterrupted")
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


SLOW = """
log = recipe._MetricsCallback.on_log
def slowly(*arguments, **keywords):
    log(*arguments, **keywords)
    time.sleep(0.3)
recipe._MetricsCallback.on_log = slowly
sys.exit(main(sys.argv[1:]))
"""


@torch.no_grad()
def logprob(model, prompt, completion):
    """The log-probability of a completion, by its definition."""
    ids = torch.tensor([prompt + completion])
    logprobs = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    return logprobs[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum().item()


def test_validation_losses_equal_the_formulas_of_the_papers(pairs):
    """Computed from the saved models: SFT's is a mean over tokens, Bradley and Terry's and DPO's are means over pairs."""
    for command in ("sft", "reward", "dpo"):
        assert main(command_line(command)) == 0
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    rows = [
        {
            side: encode_prompt_completion(
                tokenizer,
                [{"role": "user", "content": row["prompt"]}],
                [{"role": "assistant", "content": row[side]}],
            )
            for side in ("chosen", "rejected")
        }
        for row in ROWS[:3]
    ]
    base, sft, dpo = (
        AutoModelForCausalLM.from_pretrained(pairs / name).eval() for name in ("base", "sft/final", "dpo/final")
    )
    reward = AutoModelForSequenceClassification.from_pretrained(pairs / "reward/final").eval()

    def last_evaluation(command):
        return [record for record in read_metrics(pairs / command / "metrics.jsonl") if "eval_loss" in record][-1]

    nats = sum(-logprob(sft, *row["chosen"]) for row in rows)
    assert last_evaluation("sft")["eval_loss"] == pytest.approx(
        nats / sum(len(row["chosen"][1]) for row in rows), rel=1e-4
    )

    def softplus(x):
        return math.log1p(math.exp(x))

    margins = []
    for row in rows:
        log_ratio = {side: logprob(dpo, *row[side]) - logprob(base, *row[side]) for side in row}
        margins.append(0.1 * (log_ratio["chosen"] - log_ratio["rejected"]))
    assert last_evaluation("dpo")["eval_loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    assert last_evaluation("dpo")["eval_rewards/margins"] == pytest.approx(sum(margins) / 3, rel=1e-3)
    scores = [
        {
            side: reward(input_ids=torch.tensor([prompt + completion])).logits.item()
            for side, (prompt, completion) in row.items()
        }
        for row in rows
    ]
    margins = [score["chosen"] - score["rejected"] for score in scores]
    assert last_evaluation("reward")["eval_loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    report = json.loads((pairs / "reward" / "report.json").read_text())
    assert report["loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    assert report["accuracy"] == sum(m > 0 for m in margins) / 3
    assert "<svg" in (pairs / "reward" / "calibration.svg").read_text()
    assert "95% interval" in (pairs / "reward" / "final" / "README.md").read_text()


def test_the_sft_loss_equals_trls_with_gradient_accumulation(pairs, monkeypatch):
    """Completions of unequal length in three micro-batches: the model's own chunked loss, and TRL's loss with entropies."""
    rows = [{"prompt": "again", "completion": " ".join(["a"] * (1 + 3 * n))} for n in range(6)]
    (pairs / "unequal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(
                sft, "ScratchGPTForCausalLM", AutoModelForSequenceClassification
            )  # so that no model is one of ours
        more = ["--data", "unequal.jsonl", "--sft.device_batch_size", 2]
        assert main(command_line("sft", *more, steps=2, run_dir=name, batch_size=6, warmup_steps=0)) == 0
    ours, theirs = (training_records(pairs / name) for name in ("ours", "theirs"))
    assert "entropy" in theirs[0] and "entropy" not in ours[0]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in ours] == pytest.approx([record[name] for record in theirs], rel=1e-4)


def test_packed_sequences_train_like_separate_ones(pairs):
    """Packed sequences do not attend to each other: a step gives the same loss, gradient norm and weights."""
    rows = [{"prompt": word, "completion": f"{word} {word}"} for word in ("a", "b", "c", "d", "e", "f")]
    (pairs / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    ids = [encode(tokenizer, row)[0]["input_ids"] for row in prompt_completion(str(pairs / "short.jsonl")).rows]
    packed = len(pack_dataset(Dataset.from_dict({"input_ids": ids}), 64, "bfd"))
    assert packed < len(rows)
    for name, size in (("separate", len(rows)), ("packed", packed)):
        more = ["--sft.packing", name == "packed", "--data", "short.jsonl", "--validation-data", "short.jsonl"]
        assert main(command_line("sft", *more, steps=1, run_dir=name, batch_size=size, warmup_steps=0)) == 0
    separate, together = (load_file(pairs / name / "final" / "model.safetensors") for name in ("separate", "packed"))
    first, second = (read_metrics(pairs / name / "metrics.jsonl")[0] for name in ("separate", "packed"))
    assert second["tokens"] == first["tokens"] == sum(map(len, ids))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    before = load_file(pairs / "base" / "model.safetensors")
    for name, tensor in separate.items():
        # Adam's first step is the sign of the gradient, which is arbitrary where the gradient is only rounding error
        differs = (tensor - together[name]).abs() > 1e-4
        assert differs.float().mean() < 0.02, name
        assert (tensor - before[name]).abs().max() > 1e-3 or "norm" in name or "ln" in name, name


def test_lora_trains_only_the_adapters_and_merges_them(pairs):
    assert main(command_line("sft", "--lora-rank", 2)) == 0
    assert main(command_line("dpo", "--lora-rank", 2, "--merge-adapters", "false")) == 0
    before, after = (load_file(pairs / name / "model.safetensors") for name in ("base", "sft/final"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    assert (pairs / "sft" / "adapters" / "adapter_model.safetensors").is_file()
    assert (pairs / "dpo" / "final" / "adapter_model.safetensors").is_file()
    assert not (pairs / "dpo" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["grpo", "rloo"])
@pytest.mark.parametrize("done", [4, 6], ids=["at the end of an epoch", "within an epoch"])
def test_a_resumed_run_finds_its_place_among_the_prompts(pairs, command, done):
    """An epoch of the 8 prompts takes 4 steps."""
    assert main(command_line(command, steps=done + 1)) == 0
    shutil.copytree(pairs / command, pairs / "half")
    for gone in (f"checkpoint-{done + 1}", "final"):
        shutil.rmtree(pairs / "half" / gone)
    assert main(command_line(command, steps=done + 1, run_dir="half")) == 0
    assert without_times(pairs / command) == without_times(pairs / "half")
    assert training_records(pairs / command)[-1]["epoch"] == (done + 1) / 4


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("command", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_lora_on_4_bit_weights_trains_and_resumes(pairs, capsys, monkeypatch, command):
    quantized = []

    def inspect(settings, model, original=recipe.describe_model):
        linears = [module for name, module in model.named_modules() if name.endswith("_proj.base_layer")]
        quantized.extend(module.weight.dtype == torch.uint8 for module in linears)
        original(settings, model)

    module = importlib.import_module(f"scratch_gpt.alignment.{command.replace('rloo', 'grpo')}")
    monkeypatch.setattr(module, "describe_model", inspect)
    more = ["--load-in-4bit", "true", "--lora-rank", 4]
    assert main(command_line(command, *more)) == 0
    assert quantized == [True] * 14  # 7 matrices in each of 2 layers
    first, *_, last = (record["loss"] for record in training_records(pairs / command))
    assert last < first or command in ("grpo", "rloo")
    shutil.copytree(pairs / command, pairs / "half")
    for gone in ("checkpoint-6", "final", "adapters"):
        shutil.rmtree(pairs / "half" / gone)
    assert main(command_line(command, *more, run_dir="half")) == 0
    assert "resumed    checkpoint-4" in capsys.readouterr().out
    full, half = (without_times(pairs / run) for run in (command, "half"))
    assert full == half
    before, after = (load_file(folder / "model.safetensors") for folder in (pairs / "base", pairs / command / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("_proj" in name for name in changed)
    assert all(after[name].dtype == torch.float32 for name in after)


def test_4_bit_weights_require_bitsandbytes(pairs, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "is_bitsandbytes_available", lambda: False)
    assert main(command_line("sft", "--load-in-4bit", "true", "--lora-rank", 2)) == 2
    assert "pip install 'scratch-gpt[qlora]'" in capsys.readouterr().err
    assert not (pairs / "sft").exists()


def test_grpo_and_rloo_raise_the_score_and_log_the_kl_divergence(pairs):
    for command in ("grpo", "rloo"):
        settings = {"learning_rate": 1e-2, "eval_every": 1000, "save_every": 1000}
        assert main(command_line(command, f"--{command}.beta", 0.01, steps=40, **settings)) == 0
        records = training_records(pairs / command)
        scores = [record["reward"] for record in records]
        assert sum(scores[-5:]) > 1.5 * sum(scores[:5]), (command, scores)
        assert all("kl" in record for record in records)


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("sft", ["--data", "none.jsonl"], "there is no file none.jsonl"),
        ("sft", ["--model", "nothing"], "there is no model nothing"),
        (
            "sft",
            ["--sft.batch_size", 5, "--sft.device_batch_size", 2],
            "it must be a multiple of 2 (device_batch_size)",
        ),
        ("sft", ["--sft.max_length", 4], "no row is left of 8, all are longer than 4 tokens"),
        ("sft", ["--load-in-4bit"], "needs adapters to train: give --lora-rank"),
        ("sft", ["--trackers", "[nobody]"], "unknown tracker 'nobody'"),
        ("sft", ["--model", "no_template"], "the tokenizer has no chat template"),
        ("reward", ["--model", "nothing"], "cannot be loaded as a reward model"),
        ("dpo", ["--dpo.loss_type", "magic"], "magic"),
        ("dpo", ["--dpo.beta", -1], "--dpo.beta is -1"),
        ("kto", ["--kto.device_batch_size", 1], "the completion of a neighbor in its micro-batch"),
        ("kto", ["--data", "good.jsonl"], "8 desirable and 0 undesirable completions; KTO needs both"),
        ("grpo", ["--grpo.num_generations", 3], "it must be a multiple of 3"),
        ("grpo", ["--reward", "rewards_of_test:broken"], "broken raised IndexError"),
        ("grpo", ["--reward", "rewards_of_test:no_number"], "returned nan, not a finite number, for the completion"),
        ("grpo", ["--reward-model", "judge"], "give either --reward-model FOLDER or --reward MODULE:FUNCTION"),
        ("rloo", ["--rloo.max_completion_length", 64], "leaves no tokens for the prompt in the model's context of 64"),
    ],
)
def test_mistakes_are_reported_in_one_message(pairs, capsys, command, more, message):
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in ROWS]
    (pairs / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    AutoModelForCausalLM.from_pretrained(pairs / "base").save_pretrained(pairs / "no_template")
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(pairs / "no_template")
    assert main(command_line(command, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "launch", "message"),
    [
        ("sft", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        (
            "dpo",
            {**PARALLELISM, "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "which `dpo` supports only under distributed_type: FSDP and without tp_size: use configs/accelerate/fsdp2_cp.yaml",
        ),
        (
            "kto",
            {**PARALLELISM, "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "requests 2 processes (dp_replicate_size 1 x dp_shard_size 1 x tp_size 2 x cp_size 1), but the",
        ),
        ("sft", PARALLELISM, "requests replicas, and does not shard the model"),
        ("grpo", {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true"),
    ],
)
def test_unsupported_strategies_are_refused(pairs, capsys, monkeypatch, command, launch, message):
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert main(command_line(command)) == 2
    assert message in capsys.readouterr().err
    assert not (pairs / command).exists()


@pytest.mark.parametrize("sizes", [{"TP": "2"}, {"CP": "2"}])
def test_4_bit_weights_are_not_sharded(pairs, capsys, monkeypatch, sizes):
    sizes = {f"PARALLELISM_CONFIG_{kind}_SIZE": size for kind, size in sizes.items()}
    for name, value in {**PARALLELISM, "ACCELERATE_USE_FSDP": "true", **sizes}.items():
        monkeypatch.setenv(name, value)
    assert main(command_line("sft", "--lora-rank", 2, "--load-in-4bit", "true")) == 2
    assert "tensor and context parallelism do not shard quantized weights" in capsys.readouterr().err


def test_model_parallel_ranks_take_full_groups(pairs, capsys, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    monkeypatch.setattr(grpo, "data_parallel_size", lambda: 3)
    assert main(command_line("grpo", "--grpo.scale_rewards", "batch")) == 2
    errors = capsys.readouterr().err
    assert "it must be a multiple of 4 (num_generations) x 3 (data-parallel ranks)" in errors
    assert "scale_rewards batch: with tensor or context parallelism scores are scaled within a group" in errors


def test_a_non_finite_loss_stops_the_run(pairs, capsys):
    assert main(command_line("sft", steps=20, learning_rate=1e30, max_grad_norm=1e30)) == 2
    output = capsys.readouterr().err
    assert re.search("(the loss|gradient's norm) is (nan|inf)", output)
    assert "start over with --fresh and a lower learning rate" in output


def test_reused_completions_are_logged_once(pairs, capsys):
    assert main(command_line("grpo", num_iterations=2, steps=4)) == 0
    records = training_records(pairs / "grpo")
    assert ["reward" in record for record in records] == [True, False, True, False]
    assert "completions of an earlier step" in capsys.readouterr().out
