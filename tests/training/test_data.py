"""The data settings of `scratch-gpt pretrain`: packing, masks, mixtures and phases, and the lines printed about them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from scratch_gpt.cli import main
from scratch_gpt.data.shards import MANIFEST, write_shards
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer
from scratch_gpt.training.checkpoint import read_state
from scratch_gpt.training.metrics import read_metrics
from tests.conftest import TINY_RUN

STEPS = 12


def write_source(folder, name, seed, tokenizer_folder, largest=300):
    """Write random documents as the only source of ``folder``."""
    rng = np.random.default_rng(seed)
    tokenizer = load_tokenizer(tokenizer_folder)

    def documents(number):
        for _ in range(number):
            ids = rng.integers(4, largest, rng.integers(3, 60)).tolist()
            yield ids, 2 * len(ids)

    return write_shards(
        folder,
        {"train": documents(60 * seed), "validation": documents(6)},
        source=name,
        vocab_size=len(tokenizer),
        end_of_text=tokenizer.eos_token_id,
        tokenizer=fingerprint(tokenizer_folder),
        description={"source": name, "text": str(seed), "held_out": "random"},
        tokens_per_shard=1000,
    )


@pytest.fixture(scope="module")
def shards(tokenizer_folder, tmp_path_factory):
    """Shards with two sources: stories, and tales of twice their size."""
    folder = tmp_path_factory.mktemp("shards") / "stories"
    manifest = write_source(folder, "stories", 1, tokenizer_folder)
    other = write_source(folder.with_name("tales"), "tales", 2, tokenizer_folder)
    manifest["sources"] |= other["sources"]
    (folder.with_name("tales") / "tales").rename(folder / "tales")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def arguments(shards, tokenizer_folder, tmp_path):
    def build(name, *more):
        run = ["pretrain", "--run-dir", str(tmp_path / name), "--max-steps", str(STEPS), *TINY_RUN]
        data = ["--data-path", str(shards), "--tokenizer-path", str(tokenizer_folder)]
        return [*run, *data, "--training.eval_every", "6", "--training.save_every", "3", *more]

    return build


PHASES = [
    {"name": "pretrain", "share": 0.75, "mixture": {"stories": 0.25, "tales": 0.75}},
    {"name": "mid-training", "share": 0.25, "mixture": {"stories": 1.0}},
]


def test_phases_with_packing_and_mask_are_the_same_run_after_a_kill(arguments, tmp_path, capsys):
    config = tmp_path / "phases.yaml"
    config.write_text(yaml.safe_dump({"training": {"phases": PHASES, "packing": "best_fit", "document_mask": True}}))
    more = ["--config", str(config), "--model.overrides.hidden_dropout", "0.1"]
    assert main(arguments("uninterrupted", *more)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"packing    stories: \d+ sequences per epoch, \d\.\d\d% padding", printed)
    assert "mixture    pretrain (75% of the steps): stories 2" in printed
    assert "mixture    mid-training (25% of the steps): stories 100.0% of the sequences" in printed
    assert re.search(r"data read  stories \d\.\d\d times, tales \d\.\d\d times", printed)

    records = read_metrics(tmp_path / "uninterrupted" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["pretrain"] * 9 + ["mid-training"] * 3
    epochs = [record["epochs"] for record in records]
    assert 0 < epochs[8]["stories"] < epochs[11]["stories"]
    assert 0 < epochs[8]["tales"] == epochs[11]["tales"]
    assert all(0 <= record["data_seconds"] < 1 for record in records)
    assert set(records[-1]["validation"]) == {"stories", "tales"}

    command = [sys.executable, "-m", "scratch_gpt", *arguments("killed", *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) < 10:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert main(arguments("killed", *more)) == 0
    again = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    for key in ("loss", "tokens", "phase", "epochs"):
        assert [record[key] for record in again] == [record[key] for record in records]
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("uninterrupted", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validation_of_all_text_is_the_mean_over_its_sources(arguments, shards, tmp_path):
    assert main(arguments("run", "--max-steps", "2")) == 0
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    sources = json.loads((shards / MANIFEST).read_text())["sources"]
    nats = num_tokens = num_bytes = 0.0
    for name, result in record["validation"].items():
        split = sources[name]["splits"]["validation"]
        nats, num_tokens = nats + result["loss"] * split["tokens"], num_tokens + split["tokens"]
        num_bytes += split["bytes"]
        assert result["bits_per_byte"] == pytest.approx(result["loss"] * split["tokens"] / np.log(2) / split["bytes"])
    assert record["validation_loss"] == pytest.approx(nats / num_tokens)
    assert record["validation_bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes)


def test_another_batch_size_continues_with_the_next_row(arguments, tmp_path, monkeypatch):
    """Runs of 8 rows per step, and of 8 then 4, read the same rows in the same order."""
    from scratch_gpt.data import loader

    rows = []
    read_sequences = loader.read_sequences
    monkeypatch.setattr(
        loader,
        "read_sequences",
        lambda chosen, *more: rows.extend(r for _, r in chosen) or read_sequences(chosen, *more),
    )

    def read(name, *more):
        rows.clear()
        assert main(arguments(name, *more)) == 0
        return rows[8:]  # the first batch is read once more, to choose the precision

    uninterrupted = read("uninterrupted", "--max-steps", "6")
    before = read("changed", "--max-steps", "3")
    half = [*arguments("changed", "--max-steps", "9"), "--training.total_batch_size", "128"]
    rows.clear()
    assert main(half) == 0
    assert before + rows == uninterrupted
    assert read_state(tmp_path / "changed" / "checkpoint-9").data_position.row == 3 * 8 + 6 * 4
    assert read_metrics(tmp_path / "changed" / "metrics.jsonl")[-1]["tokens"] == sum(
        c for r in uninterrupted for _, c in r
    )


def test_another_mixture_is_another_run(arguments, capsys):
    assert main(arguments("run", "--max-steps", "1")) == 0
    assert main(arguments("run", "--max-steps", "2", "--training.mixture", '{"stories": 0.7, "tales": 0.3}')) == 2
    assert "training.mixture.stories is None there and 0.7 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--training.mixture", '{"story": 1}'],
            "the mixture of pretrain names story, but the shards hold stories, tales",
        ),
        (["--training.mixture", '{"stories": 1}', "--training.phases", json.dumps(PHASES)], "not both"),
        (["--training.phases", json.dumps(PHASES[:1])], "the shares are 0.75; .* they must sum to 1"),
        (["--training.packing", "worst_fit"], "worst_fit"),
    ],
)
def test_invalid_mixtures_are_refused(more, message, arguments, tmp_path, capsys):
    assert main(arguments("run", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_token_ids_outside_of_the_vocabulary_are_refused_before_training(arguments, tokenizer_folder, tmp_path, capsys):
    def attempt(folder, name):
        run = arguments(name)
        run[run.index("--data-path") + 1] = str(folder)
        assert main(run) == 2
        assert not list((tmp_path / name).glob("checkpoint-*"))
        return capsys.readouterr().err

    write_source(tmp_path / "foreign", "tales", 1, tokenizer_folder, largest=450)
    assert re.search(
        r"shards of tales hold the token id 4\d\d, but the model's vocabulary ends at 399",
        attempt(tmp_path / "foreign", "a"),
    )
    manifest = json.loads((tmp_path / "foreign" / MANIFEST).read_text())
    (tmp_path / "foreign" / MANIFEST).write_text(json.dumps(manifest | {"vocab_size": 401}))
    assert "was made with a vocabulary of 401 tokens, the model has 400" in attempt(tmp_path / "foreign", "b")
    (tmp_path / "foreign" / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))
    assert "was made with another tokenizer" in attempt(tmp_path / "foreign", "c")
