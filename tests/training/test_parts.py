"""Schedule, optimizer, validation and gradient accumulation, each against its definition."""

import math

import numpy as np
import pytest
import torch
from transformers import get_wsd_schedule

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.config import TrainingSettings
from scratch_gpt.data.batches import read_sequences
from scratch_gpt.data.packing import pack
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.distributed.optimizer import build_optimizer, describe
from scratch_gpt.distributed.safetensors_reader import SafetensorsReader
from scratch_gpt.evaluation.bits_per_byte import as_validation, score_stream
from scratch_gpt.model.presets import preset
from scratch_gpt.training.lr_schedule import batch_size_at, learning_rate


def tiny_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ScratchGPTForCausalLM(ScratchGPTConfig(**{**sizes, "max_position_embeddings": 16, **fields}))


def random_stream(num_tokens=200):
    tokens, documents = np.random.default_rng(0).integers(0, 50, num_tokens), np.arange(0, num_tokens, 9)
    return TokenStream([tokens], num_bytes=3 * num_tokens, documents=[documents])


def test_wsd_warms_up_stays_and_decays_linearly_to_zero():
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=4, decay_fraction=0.5)
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:10] == [1.0] * 5
    assert np.diff(rates[10:]) == pytest.approx([-1 / 11] * 9)
    assert learning_rate(20, 20, settings) == 0.0


def test_wsd_follows_transformers_between_the_ends():
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=10, decay_fraction=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    stock = get_wsd_schedule(
        optimizer,
        num_warmup_steps=10,
        num_decay_steps=50,
        num_training_steps=100,
        decay_type="linear",
        min_lr_ratio=0.0,
    )
    for step in range(100):
        # ours never spends a step at rate zero, so it is one step ahead in warm-up and decay
        assert learning_rate(step, 100, settings) == pytest.approx(stock.get_last_lr()[0], abs=0.1)
        optimizer.step()
        stock.step()


def test_cosine_ends_at_a_tenth_of_the_peak():
    settings = TrainingSettings(learning_rate=2.0, schedule="cosine", warmup_steps=0)
    assert learning_rate(0, 10, settings) == 2.0
    assert learning_rate(5, 10, settings) == pytest.approx(2.0 * 0.55)
    assert learning_rate(10, 10, settings) == pytest.approx(0.2)


def test_linear_and_constant_and_a_floor():
    linear = TrainingSettings(learning_rate=1.0, schedule="linear", warmup_steps=2)
    rates = [learning_rate(step, 12, linear) for step in range(13)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *np.linspace(1, 0, 11)])
    floored = TrainingSettings(learning_rate=2.0, schedule="linear", warmup_steps=0, min_lr_ratio=0.25)
    assert learning_rate(12, 12, floored) == pytest.approx(0.5)
    constant = TrainingSettings(learning_rate=2.0, schedule="constant", warmup_steps=1)
    assert [learning_rate(step, 9, constant) for step in (0, 1, 5, 9)] == [1.0, 2.0, 2.0, 2.0]


def test_the_batch_grows_in_whole_micro_batches():
    settings = TrainingSettings(batch_warmup_steps=7)
    rows = [batch_size_at(step, 64, 8, settings) for step in range(10)]
    assert rows == [8, 16, 24, 32, 40, 48, 56, 64, 64, 64]
    assert batch_size_at(0, 64, 8, TrainingSettings()) == 64
    assert [batch_size_at(step, 12, 4, TrainingSettings(batch_warmup_steps=2)) for step in range(4)] == [4, 8, 12, 12]


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


def test_muon_takes_the_matrices_of_the_blocks_and_moves_them_as_its_definition_says():
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
def test_optimizer_state_survives_a_file(tmp_path, optimizer_name):
    from safetensors.torch import save_file

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


def test_bits_per_byte_is_the_definition():
    model, stream = tiny_model().eval(), random_stream(100)
    result = as_validation(*score_stream(model, stream, 16, 50).tolist(), stream.num_bytes)
    nats = 0.0
    for first in range(0, 100, 16):  # token by token, each predicted from the tokens of its row before it
        row = stream.read(first - 1, min(16, 100 - first) + 1)
        for position in range(1, len(row)):
            with torch.no_grad():
                logits = model(torch.from_numpy(row[None, :position])).logits[0, -1].double().numpy()
            nats -= logits[row[position]] - np.log(np.exp(logits).sum())
    assert result.loss == pytest.approx(nats / 100, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 300, rel=1e-5)


def test_shares_of_a_validation_add_up():
    model, stream = tiny_model().eval(), random_stream(2000)
    whole = score_stream(model, stream, 16, 50)
    parts = sum(score_stream(model, stream, 16, 50, rank=share, world_size=3) for share in range(3))
    torch.testing.assert_close(parts, whole)
    assert whole[1] == 2000


@pytest.mark.parametrize("document_mask", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(document_mask):
    stream = random_stream()
    packing = pack(stream, "concat", 16, document_mask, 0)
    rows = [(stream, packing.sequence(index)) for index in range(13)]  # 12.5 rows an epoch: one row is short
    gradients = []
    for size in (13, 3):
        model = tiny_model().train()
        for first in range(0, 13, size):
            batch = read_sequences(rows[first : first + size], 16, document_mask)
            loss = model(
                input_ids=batch.input_ids,
                shift_labels=batch.targets,
                position_ids=batch.position_ids,
                num_items_in_batch=200,
            ).loss
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.mark.parametrize("name", ["gpt2", "modern-2m"])
def test_weights_are_drawn_as_the_model_says_each_from_its_own_name(name):
    config = preset(name, **SMALL, num_hidden_layers=2)
    torch.manual_seed(0)
    stock, ours, again = ScratchGPTForCausalLM(config), build_model(config, 1), build_model(config, 1)
    other = build_model(preset(name, **SMALL, num_hidden_layers=3), 1)
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    for key, weight in stock.named_parameters():
        drawn = ours.get_parameter(key)
        assert drawn.std().item() == pytest.approx(weight.std().item(), rel=0.1, abs=1e-6), key
        assert drawn.mean().item() == pytest.approx(weight.mean().item(), abs=0.01), key
        assert torch.equal(drawn, again.get_parameter(key)), key
    for key, buffer in stock.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(key)), key
    assert ours.lm_head.weight is ours.transformer.wte.weight
    first, second = (ours.transformer.h[layer].mlp.up_proj.weight for layer in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, other.transformer.h[0].mlp.up_proj.weight)  # whatever else there is
