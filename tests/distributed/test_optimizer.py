"""AdamW and Muon against their definitions, and their state in a file."""

import math

import pytest
import torch
from safetensors.torch import save_file

from scratch_gpt.config import TrainingSettings
from scratch_gpt.distributed.optimizer import build_optimizer, describe
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "style", [{}, {"position_embedding_type": "learned", "norm_type": "layernorm", "qk_norm": False}]
)
def test_only_matrices_of_the_blocks_decay(style):
    model = tiny_model(**style, attention_bias=True, mlp_bias=True)
    decayed, others = (group["params"] for group in build_optimizer(model, TrainingSettings()).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(names[id(p)].endswith("weight") for p in decayed)
    assert len(decayed) + len(others) == len(names)


def test_weight_decay_is_decoupled():
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, TrainingSettings(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name.endswith("_proj.weight") else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


def test_muon_updates_the_matrices_of_the_blocks_by_its_definition():
    model = tiny_model()
    settings = TrainingSettings(optimizer="muon", learning_rate=0.1, weight_decay=0.5)
    optimizers = build_optimizer(model, settings)
    muon, adamw = optimizers.optimizers
    (group,) = muon.param_groups
    assert {name.rsplit(".", 2)[-2] for name in group["param_names"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert not {id(p) for p in group["params"]} & {id(p) for p in adamw.param_groups[0]["params"]}
    assert len(group["params"]) + len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))

    matrix = model.transformer.h[0].mlp.up_proj.weight
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    update = 0.05 * matrix.grad * 0.95 + 0.05 * matrix.grad  # Nesterov momentum after one step
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    optimizers.step()
    moved = (before * (1 - 0.1 * 0.5) - matrix.detach()) / (0.1 * 0.2 * math.sqrt(max(matrix.shape)))
    # Newton-Schulz leaves singular values around 1, in bfloat16: the directions are those of the polar factor.
    singular = torch.linalg.svdvals(moved)
    assert 0.5 < singular.min() and singular.max() < 1.35
    assert torch.nn.functional.cosine_similarity(moved.flatten(), (left @ right).flatten(), dim=0) > 0.97
    assert any("Muon" in line and "mlp.up_proj.weight" in line for line in describe(optimizers))


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_training_continues_bit_for_bit_from_saved_optimizer_state(tmp_path, optimizer_name):
    def train(model, optimizer, steps):
        for step in range(steps):
            ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = tiny_model()
    settings = TrainingSettings(optimizer=optimizer_name)
    optimizer = build_optimizer(model, settings)
    train(model, optimizer, 3)
    save_file(optimizer.state_tensors(), tmp_path / "optimizer.safetensors")
    twin = tiny_model()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizer(twin, settings)
    restored.load_state_tensors(SafetensorsReader(tmp_path, "optimizer.safetensors"))
    for m, o in ((model, optimizer), (twin, restored)):
        train(m, o, 2)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
