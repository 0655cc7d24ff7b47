"""`scratch-gpt evaluate`, and its function."""

import json

import pytest
import torch

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.cli import main
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.evaluation.evaluate import evaluate


def test_an_untrained_model_has_the_loss_of_guessing(held_out, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    config = ScratchGPTConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = ScratchGPTForCausalLM(config)
    result = evaluate(model, load_tokenizer(tokenizer_folder), held_out[:1], task_folder=tmp_path, limit=10, seed=0)
    assert result.loss == pytest.approx(torch.tensor(400.0).log().item(), rel=0.02)


def test_the_command_writes_what_it_prints(saved_model, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert main(["evaluate", "--model", str(saved_model), "--limit", "10", "--output", str(output)]) == 0
    results, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert f"bits per byte {results['bits_per_byte']:.4f}" in printed
    assert [score["task"] for score in results["scores"]] == ["next_sentence", "word_order"]
