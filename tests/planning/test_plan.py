"""Each number of a plan against what is measured: bytes saved for the backward pass, optimizer state, counted FLOPs."""

import warnings
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scratch_gpt.config import (
    PlanSettings,
    PretrainSettings,
    TrainingSettings,
    parse_bytes,
    parse_settings,
    save_settings,
)
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.model.flops import flops_per_token
from scratch_gpt.model.presets import PRESETS, count_parameters, preset
from scratch_gpt.planning import memory as footprint
from scratch_gpt.planning.memory import Workload
from scratch_gpt.planning.plan import Layout, Plan, describe, largest_batch, layouts, memory

SIZE = {"vocab_size": 2011, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}
SIZE |= {"num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 512}
GPT2 = {"position_embedding_type": "learned", "norm_type": "layernorm", "mlp_type": "plain", "qk_norm": False}
GPT2 |= {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
SLIDING = {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
CONFIGS = {
    "modern, grouped queries": {},
    "modern, all heads": {"num_key_value_heads": 6},
    "gpt2": GPT2,
    "gpt2 with dropout": GPT2 | DROPOUT,
    "untied head": {"tie_word_embeddings": False},
    "padded vocabulary, relu": {"pad_vocab_size_multiple": 64, "hidden_act": "relu"},
    "no positions, layernorm": {"position_embedding_type": "none", "norm_type": "layernorm"},
    "some layers without rope": {"no_rope_layers": [1, 0, 1]},
    "sliding window": SLIDING,
    "eager attention": {"attn_implementation": "eager"},
    "softcap": {"final_logit_softcapping": 30.0},
}
SHAPES = [(3, 96), (2, 300)]  # the second has a context for which bf16 attention takes the fused kernel
pytestmark = pytest.mark.filterwarnings("ignore")


def build(fields, load):
    torch.manual_seed(0)
    config = ScratchGPTConfig(**{**SIZE, **fields})
    model = ScratchGPTForCausalLM(config).train()
    if load.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
    return config, model


def forward(model, load):
    ids = torch.randint(model.config.vocab_size, (load.rows, load.context))
    with torch.autocast("cpu", torch.bfloat16, enabled=load.precision == "bf16"):
        return model(input_ids=ids, labels=ids, shift_labels=ids).loss


def measure_saved(model, load):
    """Bytes of every storage that the forward pass saves, once each, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, load)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


every_config = pytest.mark.parametrize("name", CONFIGS)
every_load = pytest.mark.parametrize(
    "load",
    [
        Workload(rows, context, precision, "cpu", checkpointing)
        for rows, context in SHAPES
        for precision in ("fp32", "bf16")
        for checkpointing in (False, True)
    ],
    ids=lambda load: f"{load.precision}-{load.rows}x{load.context}-{'recomputed' if load.checkpointing else 'kept'}",
)


@every_config
@every_load
def test_planned_activations_and_loss_are_the_bytes_saved_for_backward(name, load):
    config, model = build(CONFIGS[name], load)
    planned = footprint.bytes_of(footprint.saved_for_backward(config, load) + footprint.saved_by_loss(config), load)
    assert planned == measure_saved(model, load)


@every_config
@every_load
def test_planned_flops_are_those_that_torch_counts(name, load):
    config, model = build(CONFIGS[name], load)
    flops = flops_per_token(config, load.context)
    planned = (flops.total + (flops.recomputed if load.checkpointing else 0)) * load.tokens
    # What the counter does not see, as `flops_per_token` explains.
    if load.precision == "fp32":
        planned -= 2 * config.padded_vocab_size * config.hidden_size * load.tokens
    if not footprint.attention_is_materialised(config, load):
        planned -= flops.attention / 6 * (8 if load.checkpointing else 6) * load.tokens
    with FlopCounterMode(display=False) as counter:
        forward(model, load).backward()
    assert planned == counter.get_total_flops()


def test_cudas_fused_attention_is_counted_with_one_product_more():
    config = ScratchGPTConfig(**SIZE)
    shape = (1, config.num_attention_heads, 128, config.head_dim)
    counted = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    planned = flops_per_token(config, 128).attention * 128 / config.num_hidden_layers
    assert counted == planned * 7 / 6


@pytest.mark.parametrize("name", ["modern, grouped queries", "gpt2", "untied head", "softcap"])
@every_load
def test_planned_total_is_the_peak_of_a_step_with_accumulated_gradients(name, load):
    config, model = build(CONFIGS[name], load)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward(model, load).backward()
    optimizer.step()
    tracker = MemTracker()  # every tensor that is allocated on the way
    tracker.track_external(model, optimizer)
    with tracker:
        forward(model, load).backward()
    peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    planned = memory(config, footprint.count(config), Layout("single", 1, ""), load).total
    assert planned == pytest.approx(peak, rel=0.05)


@every_config
def test_weights_gradients_and_optimizer_state_are_exact(name):
    load = Workload(2, 32, "fp32", "cpu")
    config, model = build(CONFIGS[name], load)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward(model, load).backward()
    optimizer.step()
    planned = memory(config, footprint.count(config), Layout("single", 1, ""), load)
    assert planned.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert planned.optimizer == sum(value.nbytes for value in moments)


def test_muon_keeps_one_momentum_of_the_projections():
    load = Workload(2, 32, "fp32", "cpu")
    config, model = build(GPT2, load)
    forward(model, load).backward()
    named = dict(model.named_parameters())
    matrices = [parameter for name, parameter in named.items() if name.endswith("_proj.weight")]
    rest = [parameter for name, parameter in named.items() if not name.endswith("_proj.weight")]
    held = 0
    for optimizer in (torch.optim.Muon(matrices), torch.optim.AdamW(rest)):
        optimizer.step()
        held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert footprint.optimizer_bytes(footprint.count(config), "muon") == held


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_exact_and_add_up(name):
    config = preset(name)
    parameters = footprint.count(config)
    assert parameters.total == count_parameters(config)
    tables = config.padded_vocab_size + (
        config.max_position_embeddings if config.position_embedding_type == "learned" else 0
    )
    assert parameters.embeddings == tables * config.hidden_size
    assert (parameters.head > 0) == (not config.tie_word_embeddings)


def test_fp16_takes_the_memory_of_bf16_and_fp8_less_by_the_copies_of_the_weights():
    plan = Plan(replace(settings(), devices=1))
    half, fp16, fp8 = (plan.row(Layout("single", 1, ""), each, False) for each in ("bf16", "fp16", "fp8"))
    assert fp16.memory == half.memory
    copies = plan.config.num_hidden_layers * footprint.copied_weights(plan.config).size(half.load)
    assert fp8.memory == replace(half.memory, activations=half.memory.activations - copies)


def test_fsdp2_really_holds_the_planned_share():
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config, model = build({"vocab_size": 2048}, Workload(1, 1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = dist.init_device_mesh("cpu", (4,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    layout = next(layout for layout in layouts(config, 4, 8) if layout.name == "fsdp2")
    planned = memory(config, footprint.count(config), layout, Workload(1, 32))
    assert planned.weights == pytest.approx(held, rel=0.05)


def test_splitting_more_never_takes_more_of_what_is_split():
    config = preset("modern-1b")
    parameters, load = footprint.count(config), Workload(1, 1024)
    by_name = {layout.name: memory(config, parameters, layout, load) for layout in layouts(config, 16, 8)}
    assert list(by_name) == ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp", "fsdp2 x tp8"]
    assert by_name["ddp"].weights == by_name["single"].weights == 4 * parameters.total
    assert by_name["fsdp2"].weights == by_name["ddp"].weights / 16
    assert by_name["hsdp"].weights == by_name["ddp"].weights / 8
    assert by_name["zero2"].gradients == by_name["zero1"].gradients / 16
    # 16 bytes a parameter in all, as under fsdp2; with whole weights also a copy of those that are updated here
    zero2, zero3 = by_name["zero2"], by_name["zero3"]
    assert (zero3.weights + zero3.gradients + zero3.optimizer) * 16 == 16 * parameters.total
    assert zero2.optimizer == zero3.optimizer + 4 * parameters.total / 16
    assert by_name["fsdp2 x tp8"].activations < by_name["fsdp2"].activations


def test_largest_batch_is_the_last_that_fits():
    for limit in (0.5, 1, 2, 3, 1000, 1023, 1024, 1025):
        assert largest_batch(lambda rows: rows, limit) == int(limit)


def settings(**fields):
    training = {"total_batch_size": 8 * 8 * 1024, "context_length": 1024, "precision": "bf16"}
    training |= fields.pop("training", {})
    plan = PlanSettings(devices=8, device_memory="80GB", peak_flops=1e15, price=2.0, **fields)
    plan.model.preset = "modern-1b"
    plan.training = TrainingSettings(**training)
    return plan


@pytest.mark.parametrize(
    ("memory_of_a_device", "devices", "layout", "checkpointing"),
    [
        ("80GB", 1, "single", False),
        ("80GB", 8, "ddp", False),
        ("33GB", 8, "ddp", True),
        ("24GB", 8, "fsdp2", False),
        ("8GB", 8, "fsdp2", True),
        ("1GB", 8, None, None),
    ],
)
def test_the_simplest_layout_that_fits_is_taken(memory_of_a_device, devices, layout, checkpointing):
    asked = replace(settings(), device_memory=memory_of_a_device, devices=devices)
    plan = Plan(asked)
    rows = plan.rows("bf16")
    chosen = plan.choice(rows)
    text = "\n".join(describe(plan))
    if layout is None:
        assert chosen is None
        assert "none fits" in text
        return
    assert (chosen.layout.name, chosen.load.checkpointing) == (layout, checkpointing)
    batch = plan.device_batch(chosen)
    assert 1 <= batch <= chosen.largest
    assert plan.rows_per_step(chosen.layout) % batch == 0
    assert f"layout     {layout} " in text
    assert f"--training.device_batch_size {batch}:" in text


def test_time_and_cost_follow_from_flops_and_mfu():
    plan = Plan(replace(settings(), tokens=1e9, mfu=0.5))
    none, full = plan.rows("bf16")[2:4]
    flops = flops_per_token(plan.config, 1024)
    assert plan.tokens_per_second(none) == pytest.approx(8 * 1e15 * 0.5 / flops.total)
    assert plan.tokens_per_second(full) == pytest.approx(8 * 1e15 * 0.5 / (flops.total + flops.recomputed))
    hours = 1e9 / plan.tokens_per_second(none) / 3600
    text = "\n".join(describe(plan))
    assert f"1,000,000,000 tokens: {hours * 60:.1f} minutes" in text
    assert f"cost {hours * 8 * 2:,.2f}" in text
    assert f"{20 * plan.parameters.total:,} tokens, 20 per parameter" in text


def test_without_a_peak_no_time_is_guessed():
    plan = Plan(replace(settings(), peak_flops=None))
    text = "\n".join(describe(plan))
    assert "time unknown" in text
    assert "tokens/s (" not in text


def test_a_runs_own_config_is_taken_unchanged(tmp_path, capsys):
    from scratch_gpt.cli import main

    run = parse_settings(PretrainSettings, ["--tokenizer.vocab_size", "1000", "--training.context_length", "64"], "x")
    save_settings(run, tmp_path / "config.yaml")
    assert main(["plan", "--config", str(tmp_path / "config.yaml"), "--device-memory", "8GB"]) == 0
    printed = capsys.readouterr().out
    assert f"{count_parameters(preset('modern-2m', vocab_size=1000)):,} parameters" in printed
    assert "context 64" in printed
    taken = parse_settings(PlanSettings, ["--config", str(tmp_path / "config.yaml")], "x")
    assert {name: asdict(taken)[name] for name in asdict(run)} == asdict(run)


def test_a_step_that_pretrain_would_refuse_is_named():
    text = "\n".join(describe(Plan(settings(training={"total_batch_size": 1000}))))
    assert "total_batch_size 1,000 is no multiple of 1,024 (context) x 8 (replicas)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("512 mb", 512 * 10**6), ("1.5TB", 15 * 10**11), ("1024", 1024)],
)
def test_amounts_of_memory_are_read(text, expected):
    assert parse_bytes(text, "device-memory") == expected


@pytest.mark.parametrize("text", ["", "GB", "80 gigs", "-1GB", "0GB", "80GBs"])
def test_other_amounts_are_refused_by_name(text):
    with pytest.raises(UserError, match="--device-memory is"):
        parse_bytes(text, "device-memory")
