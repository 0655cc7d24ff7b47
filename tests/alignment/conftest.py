"""Fixtures: a tokenizer of a few words, tiny models for it, a PPOTrainer, and a folder to run commands in."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scratch_gpt.alignment.ppo.config import PPOConfig
from scratch_gpt.alignment.ppo.trainer import PPOTrainer
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForSequenceClassification

torch.set_num_threads(1)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def words():
    """`words(48)` builds a tokenizer of that many words w0, w1, ..., and <pad> and <eos>."""

    def build(count: int, pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
        names = ["<pad>", "<eos>", *(f"w{i}" for i in range(count))]
        backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token=pad_token)

    return build


def _model(model_class, tokenizer, seed=0, **fields):
    torch.manual_seed(seed)
    config = ScratchGPTConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **{**SMALL, **fields}
    )
    return model_class(config)


@pytest.fixture
def policy():
    """`policy(tokenizer, **fields)` builds a language model with random weights."""
    return lambda tokenizer, seed=0, **fields: _model(ScratchGPTForCausalLM, tokenizer, seed, **fields)


@pytest.fixture
def classifier():
    """`classifier(tokenizer, **fields)` builds a sequence classifier with random weights, one label by default."""

    def build(tokenizer, seed=1, **fields):
        model = _model(ScratchGPTForSequenceClassification, tokenizer, seed, **{"num_labels": 1, **fields})
        torch.nn.init.normal_(model.score.weight, std=0.5)
        return model

    return build


PROMPTS = [{"prompt": " ".join(f"w{(i * 3 + j) % 5}" for j in range(1 + i % 4))} for i in range(64)]


def fraction_of_w2(completions, **_):
    """How many words are w2, as a fraction of the 12 possible."""
    return [completion.split().count("w2") / 12 for completion in completions]


@pytest.fixture
def trainer(tmp_path):
    """`trainer(model, tokenizer, reward, **settings)` builds a PPOTrainer with small rollouts on PROMPTS."""

    def build(model, tokenizer, reward=fraction_of_w2, name="run", dataset=PROMPTS, arguments=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 16,
            "num_mini_batches": 2,
            "num_ppo_epochs": 4,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "max_steps": 8,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        }
        config = PPOConfig(**{**defaults, **settings})
        return PPOTrainer(model, reward, config, train_dataset=dataset, processing_class=tokenizer, **(arguments or {}))

    return build


REWARDS = """
import time

def vowels(completions, **columns):
    return [sum(text.count(vowel) for vowel in "aeiou") / 10 for text in completions]

def vowels_said(completions, **columns):
    return vowels([messages[0]["content"] for messages in completions])

def no_number(completions, **columns):
    return [float("nan")] * len(completions)

def slow(completions, **columns):
    time.sleep(0.3)
    return vowels(completions)

def broken(completions, **columns):
    return [float(text[999]) for text in completions]
"""


@pytest.fixture
def material(tmp_path, monkeypatch, tokenizer_folder):
    """The current folder, with the models `base` and `judge`, prompts and reward functions."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, model_class in (("base", ScratchGPTForCausalLM), ("judge", ScratchGPTForSequenceClassification)):
        torch.manual_seed(0)
        config = ScratchGPTConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **size)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        model_class(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    prompts = [{"prompt": text, "note": 1} for text in ("It was", "She said that", "Then", "A letter came") * 8]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts[:4]))
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    yield tmp_path
    sys.modules.pop("rewards_of_test", None)
