"""Shared fixtures. Tests never reach the Hub, and tiny models run fastest on one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scratch_gpt.config import TokenizerSettings
from scratch_gpt.data.sources import bundled_corpus, read_documents
from scratch_gpt.data.tokenizer import save_tokenizer, train_tokenizer

torch.set_num_threads(1)

TINY_MODEL = ["--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"]
TINY_MODEL += ["--model.num_key_value_heads", "1", "--model.intermediate_size", "64"]
TINY_MODEL += ["--model.max_position_embeddings", "32"]
TINY_TRAINING = ["--tokenizer.vocab_size", "400", "--training.total_batch_size", "256", "--training.precision", "fp32"]
TINY_TRAINING += ["--training.compile", "off", "--training.warmup_steps", "2", "--training.trackers", "[]"]
TINY_RUN = TINY_MODEL + TINY_TRAINING


def pytest_addoption(parser):
    parser.addoption("--shared-data", default="../shared/data", help="folder of corpora that are not in the project")


@pytest.fixture(scope="session")
def shared_data(request) -> Path:
    return Path(request.config.rootpath, request.config.getoption("--shared-data"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text of 30 short documents, 90 kB, cut from the bundled corpus."""
    text = next(iter(read_documents([bundled_corpus("train")])))
    pieces = [text[start : start + 3000].strip() for start in range(0, 90_000, 3000)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(pieces), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(read_documents([corpus]), TokenizerSettings(vocab_size=400)), folder)
    return folder


@pytest.fixture
def scratch_gpt():
    """Run the command in a process of its own: ``scratch_gpt("pretrain", ...)`` gives the finished process."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "scratch_gpt", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, **environment},
        )

    return run
