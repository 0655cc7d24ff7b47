"""Training with float8 layers, emulated: torchao rounds as the hardware would, on any machine."""

import functools

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scratch_gpt.cli import main
from scratch_gpt.compute.float8 import use_float8
from scratch_gpt.planning.activations import Workload, saved_by_loss, saved_bytes, saved_for_backward
from tests.planning.test_plan import build, measure_saved
from tests.tiny import tiny_model
from tests.training.runs import STEPS, arguments, assert_same_run, losses

torchao = pytest.importorskip("torchao.float8", reason="needs torchao (pip install 'scratch-gpt[fp8]')")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    config = torchao.Float8LinearConfig(emulate=True)
    convert = functools.partial(torchao.convert_to_float8_training, config=config)
    monkeypatch.setattr(torchao, "convert_to_float8_training", convert)
    monkeypatch.setattr("scratch_gpt.compute.precision.check_float8", lambda device: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # keeps the autocast of a process's first run


def test_only_the_layers_of_the_blocks_are_replaced_and_no_name_or_parameter_is_new():
    model = tiny_model(hidden_size=32, head_dim=16, tie_word_embeddings=False)
    before = dict(model.named_parameters())
    use_float8(model)
    replaced = {
        name for name, module in model.named_modules() if isinstance(module, torchao.float8_linear.Float8Linear)
    }
    assert replaced == {name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")}
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_a_product_is_rounded_to_float8():
    model = tiny_model(hidden_size=32, head_dim=16)
    layer = model.transformer.h[0].mlp.up_proj
    x = torch.randn(16, 32)

    def rounded(tensor):
        scale = 448 / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    expected = rounded(x) @ rounded(layer.weight).t()
    exact = layer(x)
    use_float8(model)
    actual = model.transformer.h[0].mlp.up_proj(x)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, exact, rtol=1e-3, atol=1e-5)


def test_a_run_learns_resumes_bit_for_bit_and_saves_plain_models(corpus, tmp_path, capsys):
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    more = ["--training.precision", "fp8"]
    assert main(arguments(whole, corpus, *more)) == 0
    assert "precision  fp8, eager: as requested" in capsys.readouterr().out
    assert main([*arguments(parts, corpus, *more), "--max-hours", "1e-9"]) == 75
    assert main(arguments(parts, corpus, *more)) == 0
    assert_same_run(parts, whole)

    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(plain, corpus)) == 0
    assert losses(whole)[STEPS] < losses(whole)[1] - 0.3
    assert losses(whole) == pytest.approx(losses(plain), abs=0.1) and losses(whole) != losses(plain)
    for name in ("final", f"checkpoint-{STEPS}"):
        saved, expected = (load_file(run / name / "model.safetensors") for run in (whole, plain))
        assert {k: (t.shape, t.dtype) for k, t in saved.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
        assert (whole / name / "config.json").read_text() == (plain / name / "config.json").read_text()
        model = AutoModelForCausalLM.from_pretrained(whole / name)
        assert not [m for m in model.modules() if type(m).__name__ == "Float8Linear"]


@pytest.mark.parametrize("activation_checkpointing", ["full", "selective"])
def test_recomputing_activations_changes_nothing(activation_checkpointing, corpus, tmp_path):
    more = ["--training.precision", "fp8", "--max-steps", "3"]
    assert main(arguments(tmp_path / "kept", corpus, *more)) == 0
    more += ["--training.activation_checkpointing", activation_checkpointing]
    assert main(arguments(tmp_path / "recomputed", corpus, *more)) == 0
    assert_same_run(tmp_path / "recomputed", tmp_path / "kept")


def test_planned_activations_are_the_bytes_saved_for_backward(monkeypatch):
    load = Workload(2, 320, "fp8", "cpu")
    config, model = build({"intermediate_size": 192}, load)
    use_float8(model)
    real = torch.is_autocast_enabled
    # The layers ask for the GPU's autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: real(device) if device else True)
    monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: torch.bfloat16)
    planned = saved_bytes(saved_for_backward(config, load) + saved_by_loss(config), load)
    assert planned == measure_saved(model, load)
