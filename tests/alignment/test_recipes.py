"""The stages as a user runs them, but for what is PPO's own."""

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
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import pack_dataset
from trl.trainer.utils import RepeatSampler

from scratch_gpt.alignment import grpo, sft
from scratch_gpt.alignment import recipe as stage
from scratch_gpt.alignment.data.chat_template import encode_answer
from scratch_gpt.alignment.data.dataset import conversations
from scratch_gpt.alignment.sampler import RepeatingSampler
from scratch_gpt.alignment.sft import encode
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.cli import main
from scratch_gpt.config import SFTSettings
from scratch_gpt.errors import UserError
from scratch_gpt.training.metrics import read_metrics

ROWS = [
    {"prompt": f"Who is {name}?", "chosen": f"{name} is a friend.", "rejected": f"I do not know {name} at all."}
    for name in ("Ann", "Bess", "Cleo", "Dora", "Emma", "Fay", "Gwen", "Hope")
]
SIZES = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
VERBS = ("sft", "reward", "dpo", "kto", "grpo", "rloo")


@pytest.fixture
def pairs(material):
    """Beside the model: pairs.jsonl, and held_pairs.jsonl."""
    for name, rows in (("pairs", ROWS), ("held_pairs", ROWS[:3])):
        (material / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return material


def words(verb, *more, steps=6, run_dir=None, **settings):
    given = [verb, "--model", "base", "--data", "pairs.jsonl", "--validation-data", "held_pairs.jsonl"]
    given += ["--run-dir", run_dir or verb, "--max-steps", steps]
    own = {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 1, "eval_every": 6, "save_every": 2, **settings}
    if verb in ("grpo", "rloo"):
        own = {**own, "num_generations": 4, "max_completion_length": 8, "batch_size": 8}
        given += ["--reward", "rewards_of_test:vowels_said"]
    for name, value in own.items():
        given += [f"--{verb}.{name}", value]
    return [str(word) for word in [*given, *more]]


def without_times(folder):
    records = read_metrics(folder / "metrics.jsonl")
    leave = ("time", "tokens_per_second", "step_time")
    return [
        {name: value for name, value in record.items() if not name.endswith(leave) and "_runtime" not in name
         and "per_second" not in name}
        for record in records
    ]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_stage_writes_a_model_like_any_other_and_is_finished_then(pairs, capsys, verb):
    assert main(words(verb)) == 0
    run = pairs / verb
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
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
    kind = AutoModelForSequenceClassification if verb == "reward" else AutoModelForCausalLM
    saved = kind.from_pretrained(run / "final")
    assert saved.config.use_cache is True
    if verb != "reward":
        turn = AutoTokenizer.from_pretrained(run / "final").convert_tokens_to_ids("<|im_end|>")
        assert turn in saved.generation_config.eos_token_id
    card = (run / "final" / "README.md").read_text()
    assert "6 optimizer steps, seed 1337" in card and "`pairs.jsonl`" in card
    capsys.readouterr()
    assert main(words(verb)) == 0
    assert "is finished (6 steps)" in capsys.readouterr().out
    assert main(words(verb, "--seed", "2")) == 2
    assert "seed is 1337 there and 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "end"), [("dpo", signal.SIGTERM), ("sft", signal.SIGKILL), ("grpo", signal.SIGKILL)])
def test_a_run_that_was_ended_goes_on_bit_for_bit(pairs, capsys, verb, end):
    """SIGTERM saves and exits with 75; after SIGKILL the newest checkpoint stands, and one cut short is left out."""
    more = ["--dpo.device_batch_size", 2] if verb == "dpo" else []
    assert main(words(verb, *more, steps=8, run_dir="whole")) == 0
    every = 1000 if end == signal.SIGTERM else 2
    command = words(verb, *more, steps=8, run_dir="ended", save_every=every)
    slow = f"import sys, time\nimport scratch_gpt.alignment.recipe as stage\nfrom scratch_gpt.cli import main\n{SLOW}"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(read_metrics(pairs / "ended" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(end)
    _, errors = process.communicate()
    if end == signal.SIGTERM:
        assert process.returncode == 75 and "The same command goes on" in errors
    else:
        (pairs / "ended" / "checkpoint-4").mkdir(exist_ok=True)  # as if it had been saving
        (pairs / "ended" / "checkpoint-4" / "trainer_state" / "complete.json").unlink(missing_ok=True)
    assert not (pairs / "ended" / "final").exists()
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "of 8 steps are done" in said
    assert end == signal.SIGTERM or "checkpoint-4 is not used: it was not finished" in said
    assert without_times(pairs / "ended") == without_times(pairs / "whole")
    ended, whole = (load_file(pairs / name / "final" / "model.safetensors") for name in ("ended", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ended.items())


SLOW = """
log = stage._MetricsCallback.on_log
def slowly(*arguments, **keywords):
    log(*arguments, **keywords)
    time.sleep(0.3)
stage._MetricsCallback.on_log = slowly
sys.exit(main(sys.argv[1:]))
"""


@torch.no_grad()
def logprob(model, prompt, answer):
    """Of an answer, by its definition."""
    ids = torch.tensor([prompt + answer])
    logprobs = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    return logprobs[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum().item()


def test_losses_are_what_the_papers_say(pairs):
    """Of the held-out rows, from the saved models: SFT's mean over tokens, Bradley-Terry's and DPO's over pairs."""
    for verb in ("sft", "reward", "dpo"):
        assert main(words(verb)) == 0
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    rows = [
        {side: encode_answer(tokenizer, *([{"role": role, "content": text}] for role, text in (("user", row["prompt"]), ("assistant", row[side]))))
         for side in ("chosen", "rejected")}
        for row in ROWS[:3]
    ]  # fmt: skip
    base, sft, dpo = (
        AutoModelForCausalLM.from_pretrained(pairs / name).eval() for name in ("base", "sft/final", "dpo/final")
    )
    reward = AutoModelForSequenceClassification.from_pretrained(pairs / "reward/final").eval()

    def last(verb):
        return [record for record in read_metrics(pairs / verb / "metrics.jsonl") if "eval_loss" in record][-1]

    nats = sum(-logprob(sft, *row["chosen"]) for row in rows)
    assert last("sft")["eval_loss"] == pytest.approx(nats / sum(len(row["chosen"][1]) for row in rows), rel=1e-4)

    def softplus(x):
        return math.log1p(math.exp(x))

    margins = []
    for row in rows:
        of = {side: logprob(dpo, *row[side]) - logprob(base, *row[side]) for side in row}
        margins.append(0.1 * (of["chosen"] - of["rejected"]))
    assert last("dpo")["eval_loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    assert last("dpo")["eval_rewards/margins"] == pytest.approx(sum(margins) / 3, rel=1e-3)
    scores = [
        {
            side: reward(input_ids=torch.tensor([prompt + answer])).logits.item()
            for side, (prompt, answer) in row.items()
        }
        for row in rows
    ]
    margins = [score["chosen"] - score["rejected"] for score in scores]
    assert last("reward")["eval_loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    found = json.loads((pairs / "reward" / "report.json").read_text())
    assert found["loss"] == pytest.approx(sum(softplus(-m) for m in margins) / 3, rel=1e-4)
    assert found["accuracy"] == sum(m > 0 for m in margins) / 3
    assert "<svg" in (pairs / "reward" / "calibration.svg").read_text()
    assert "95% interval" in (pairs / "reward" / "final" / "README.md").read_text()


def test_the_loss_is_that_of_trl_also_over_parts_of_a_batch(pairs, monkeypatch):
    """Answers of unequal length in three parts: the model's own chunked loss, and TRL's head that makes entropies as well."""
    rows = [{"prompt": "again", "completion": " ".join(["a"] * (1 + 3 * n))} for n in range(6)]
    (pairs / "unequal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(sft, "ScratchGPTForCausalLM", AutoModelForSequenceClassification)  # nothing is one here
        more = ["--data", "unequal.jsonl", "--sft.device_batch_size", 2]
        assert main(words("sft", *more, steps=2, run_dir=name, batch_size=6, warmup_steps=0)) == 0
    ours, theirs = (
        [record for record in read_metrics(pairs / name / "metrics.jsonl") if "loss" in record]
        for name in ("ours", "theirs")
    )
    assert "entropy" in theirs[0] and "entropy" not in ours[0]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in ours] == pytest.approx([record[name] for record in theirs], rel=1e-4)


def test_packed_rows_learn_what_rows_apart_learn(pairs):
    """Rows in one do not see each other: one step from all of them at once gives the same loss, gradient and weights."""
    rows = [{"prompt": word, "completion": f"{word} {word}"} for word in ("a", "b", "c", "d", "e", "f")]
    (pairs / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    ids = [
        encode(tokenizer, row)[0]["input_ids"] for row in conversations(SFTSettings(), str(pairs / "short.jsonl")).rows
    ]
    packed = len(pack_dataset(Dataset.from_dict({"input_ids": ids}), 64, "bfd"))
    assert packed < len(rows)
    for name, size in (("apart", len(rows)), ("packed", packed)):
        more = ["--sft.packing", name == "packed", "--data", "short.jsonl", "--validation-data", "short.jsonl"]
        assert main(words("sft", *more, steps=1, run_dir=name, batch_size=size, warmup_steps=0)) == 0
    apart, together = (load_file(pairs / name / "final" / "model.safetensors") for name in ("apart", "packed"))
    first, second = (read_metrics(pairs / name / "metrics.jsonl")[0] for name in ("apart", "packed"))
    assert second["tokens"] == first["tokens"] == sum(map(len, ids))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    before = load_file(pairs / "base" / "model.safetensors")
    for name, tensor in apart.items():
        # Adam's first step is the sign of the gradient: where that is nothing but rounding it may be either
        differs = (tensor - together[name]).abs() > 1e-4
        assert differs.float().mean() < 0.02, name
        assert (tensor - before[name]).abs().max() > 1e-3 or "norm" in name or "ln" in name, name


def test_adapters_alone_are_trained_saved_and_merged(pairs):
    assert main(words("sft", "--lora-rank", 2)) == 0
    assert main(words("dpo", "--lora-rank", 2, "--merge-adapters", "false")) == 0
    before, after = (load_file(pairs / name / "model.safetensors") for name in ("base", "sft/final"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    assert (pairs / "sft" / "adapters" / "adapter_model.safetensors").is_file()
    assert (pairs / "dpo" / "final" / "adapter_model.safetensors").is_file()
    assert not (pairs / "dpo" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("verb", ["grpo", "rloo"])
@pytest.mark.parametrize("done", [4, 6], ids=["at its end", "within it"])
def test_prompts_go_on_in_a_later_pass_as_if_nothing_had_been(pairs, verb, done):
    """A pass over the 8 prompts takes 4 steps."""
    assert main(words(verb, steps=done + 1)) == 0
    shutil.copytree(pairs / verb, pairs / "half")
    for gone in (f"checkpoint-{done + 1}", "final"):
        shutil.rmtree(pairs / "half" / gone)
    assert main(words(verb, steps=done + 1, run_dir="half")) == 0
    assert without_times(pairs / verb) == without_times(pairs / "half")
    last = [record for record in without_times(pairs / verb) if "loss" in record][-1]
    assert last["epoch"] == (done + 1) / 4


def test_each_pass_takes_all_prompts_in_an_order_of_its_own():
    one_pass = RepeatSampler(range(10), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)
    trls = list(one_pass)
    passes = RepeatingSampler(one_pass, 3 * len(trls) - 1, 5)
    rows = list(passes)
    assert rows == list(passes) and len(rows) == len(passes)
    each = [rows[start : start + len(trls)] for start in range(0, len(rows), len(trls))]
    assert each[0] == trls and each[0] != each[1] != each[2]
    assert all(len(set(some)) == 9 for some in each[:2])
    with pytest.raises(ValueError, match="2 prompts are fewer than the 3 of one batch"):
        RepeatingSampler(RepeatSampler(range(2), mini_repeat_count=2, batch_size=3, seed=5), 12, 5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("verb", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_adapters_are_trained_over_weights_in_4_bits_and_the_run_goes_on(pairs, capsys, monkeypatch, verb):
    packed = []

    def look(settings, model, original=stage.describe_model):
        linears = [module for name, module in model.named_modules() if name.endswith("_proj.base_layer")]
        packed.extend(module.weight.dtype == torch.uint8 for module in linears)
        original(settings, model)

    module = importlib.import_module(f"scratch_gpt.alignment.{verb.replace('rloo', 'grpo')}")
    monkeypatch.setattr(module, "describe_model", look)
    more = ["--load-in-4bit", "true", "--lora-rank", 4]
    assert main(words(verb, *more)) == 0
    assert packed == [True] * 14  # of two layers
    first, *_, last = (r["loss"] for r in read_metrics(pairs / verb / "metrics.jsonl") if "loss" in r)
    assert last < first or verb in ("grpo", "rloo")
    shutil.copytree(pairs / verb, pairs / "half")
    for gone in ("checkpoint-6", "final", "adapters"):
        shutil.rmtree(pairs / "half" / gone)
    assert main(words(verb, *more, run_dir="half")) == 0
    assert "resumed    checkpoint-4" in capsys.readouterr().out
    whole, half = (without_times(pairs / run) for run in (verb, "half"))
    assert whole == half
    before, after = (load_file(folder / "model.safetensors") for folder in (pairs / "base", pairs / verb / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("_proj" in name for name in changed)
    assert all(after[name].dtype == torch.float32 for name in after)


def test_weights_in_4_bits_ask_for_the_package(pairs, capsys, monkeypatch):
    monkeypatch.setattr(stage, "is_bitsandbytes_available", lambda: False)
    assert main(words("sft", "--load-in-4bit", "true", "--lora-rank", 2)) == 2
    assert "pip install 'scratch-gpt[qlora]'" in capsys.readouterr().err
    assert not (pairs / "sft").exists()


def test_drawing_raises_the_score(pairs):
    """GRPO and RLOO learn to say what is rewarded; the divergence is told beside."""
    for verb in ("grpo", "rloo"):
        settings = {"learning_rate": 1e-2, "eval_every": 1000, "save_every": 1000}
        assert main(words(verb, f"--{verb}.beta", 0.01, steps=40, **settings)) == 0
        scores = [r["reward"] for r in read_metrics(pairs / verb / "metrics.jsonl") if "loss" in r]
        assert sum(scores[-5:]) > 1.5 * sum(scores[:5]), (verb, scores)
        assert all("kl" in r for r in read_metrics(pairs / verb / "metrics.jsonl") if "loss" in r)


@pytest.mark.parametrize(
    ("verb", "more", "message"),
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
        ("sft", ["--trackers", "[nobody]"], "there is no tracker 'nobody'"),
        ("sft", ["--model", "silent"], "the tokenizer has no chat template"),
        ("reward", ["--model", "nothing"], "holds no model that could give scores"),
        ("dpo", ["--dpo.loss_type", "magic"], "magic"),
        ("dpo", ["--dpo.beta", -1], "--dpo.beta is -1"),
        ("kto", ["--kto.device_batch_size", 1], "compared with a neighbour's answer"),
        ("kto", ["--data", "good.jsonl"], "8 good and 0 bad answers; it takes both"),
        ("grpo", ["--grpo.num_generations", 3], "it must be a multiple of 3"),
        ("grpo", ["--reward", "rewards_of_test:broken"], "broken raised IndexError"),
        ("grpo", ["--reward", "rewards_of_test:no_number"], "gave nan for the completion"),
        ("grpo", ["--reward-model", "judge"], "give one of --reward-model FOLDER and --reward MODULE:FUNCTION"),
        ("rloo", ["--rloo.max_completion_length", 64], "the model's whole context 64 tokens"),
    ],
)
def test_mistakes_are_told_in_one_message(pairs, capsys, verb, more, message):
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in ROWS]
    (pairs / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    AutoModelForCausalLM.from_pretrained(pairs / "base").save_pretrained(pairs / "silent")
    tokenizer = AutoTokenizer.from_pretrained(pairs / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(pairs / "silent")
    assert main(words(verb, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "launch", "message"),
    [
        ("sft", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        (
            "dpo",
            {**SIZES, "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "which `dpo` does under distributed_type: FSDP and without tp_size: take configs/accelerate/fsdp2_cp.yaml",
        ),
        (
            "kto",
            {**SIZES, "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "asks for 2 processes (1 copies in 1 parts, each over 2), the",
        ),
        ("sft", SIZES, "asks for copies, and for no parts"),
        ("grpo", {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true"),
    ],
)
def test_layouts_in_which_a_stage_does_not_run_are_refused(pairs, capsys, monkeypatch, verb, launch, message):
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert main(words(verb)) == 2
    assert message in capsys.readouterr().err
    assert not (pairs / verb).exists()


@pytest.mark.parametrize("sizes", [{"TP": "2"}, {"CP": "2"}])
def test_packed_weights_are_not_divided(pairs, capsys, monkeypatch, sizes):
    sizes = {f"PARALLELISM_CONFIG_{kind}_SIZE": size for kind, size in sizes.items()}
    for name, value in {**SIZES, "ACCELERATE_USE_FSDP": "true", **sizes}.items():
        monkeypatch.setenv(name, value)
    assert main(words("sft", "--lora-rank", 2, "--load-in-4bit", "true")) == 2
    assert "tensor and context parallelism do not divide packed weights" in capsys.readouterr().err


def test_groups_lie_whole_in_processes_that_share_rows(pairs, capsys, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    monkeypatch.setattr(grpo, "data_parallel_size", lambda: 3)
    assert main(words("grpo", "--grpo.scale_rewards", "batch")) == 2
    said = capsys.readouterr().err
    assert "it must be a multiple of 4 (num_generations) x 3 (processes that read rows of their own)" in said
    assert "scale_rewards batch: where processes share rows the deviation is that of a group" in said


def test_processes_that_share_rows_divide_no_model_of_others():
    of_another = SimpleNamespace(result=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="tp divides .* this is a Linear: make it one by `scratch-gpt import`"):
        ResumableTrainerMixin.use_model_parallel(of_another, SimpleNamespace(name="tp"))


def test_a_loss_that_is_not_finite_ends_the_run_and_its_checkpoints_stay(pairs, capsys):
    assert main(words("sft", steps=20, learning_rate=1e30, max_grad_norm=1e30)) == 2
    said = capsys.readouterr().err
    assert re.search("(the loss|gradient's norm) is (nan|inf)", said)
    assert "start over with --fresh and a lower learning rate" in said


def test_completions_that_are_learnt_from_twice_are_told_of_once(pairs, capsys):
    assert main(words("grpo", num_iterations=2, steps=4)) == 0
    records = [record for record in read_metrics(pairs / "grpo" / "metrics.jsonl") if "loss" in record]
    assert ["reward" in record for record in records] == [True, False, True, False]
    assert "completions of an earlier step" in capsys.readouterr().out
