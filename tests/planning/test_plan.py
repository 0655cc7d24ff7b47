"""Planned numbers equal measured ones: bytes saved for the backward pass, optimizer state, FLOPs. Then the choice of a layout."""

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
from scratch_gpt.planning.activations import (
    Workload,
    autocast_weight_copies,
    materializes_attention_scores,
    saved_by_loss,
    saved_bytes,
    saved_for_backward,
)
from scratch_gpt.planning.dry_run import fake_process_group
from scratch_gpt.planning.layouts import Layout, possible_layouts
from scratch_gpt.planning.memory import estimate_memory, largest_fitting_batch
from scratch_gpt.planning.parameters import optimizer_state_bytes, parameter_counts
from scratch_gpt.planning.plan import describe
from scratch_gpt.planning.planner import Plan

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
SHAPES = [(3, 96), (2, 300)]  # the second context is long enough for bf16 attention to use the fused kernel
pytestmark = pytest.mark.filterwarnings("ignore")


def build(fields, workload):
    torch.manual_seed(0)
    config = ScratchGPTConfig(**{**SIZE, **fields})
    model = ScratchGPTForCausalLM(config).train()
    if workload.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
    return config, model


def forward(model, workload):
    ids = torch.randint(model.config.vocab_size, (workload.sequences, workload.context_length))
    with torch.autocast("cpu", torch.bfloat16, enabled=workload.precision == "bf16"):
        return model(input_ids=ids, labels=ids, shift_labels=ids).loss


def measure_saved(model, workload):
    """Bytes of every storage that the forward pass saves, each counted once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, workload)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


every_config = pytest.mark.parametrize("name", CONFIGS)
every_workload = pytest.mark.parametrize(
    "workload",
    [
        Workload(sequences, context_length, precision, "cpu", checkpointing)
        for sequences, context_length in SHAPES
        for precision in ("fp32", "bf16")
        for checkpointing in (False, True)
    ],
    ids=lambda workload: (
        f"{workload.precision}-{workload.sequences}x{workload.context_length}-{'recomputed' if workload.checkpointing else 'kept'}"
    ),
)


@every_config
@every_workload
def test_planned_activations_and_loss_are_the_bytes_saved_for_backward(name, workload):
    config, model = build(CONFIGS[name], workload)
    planned = saved_bytes(saved_for_backward(config, workload) + saved_by_loss(config), workload)
    assert planned == measure_saved(model, workload)


@every_config
@every_workload
def test_planned_flops_equal_those_that_torch_counts(name, workload):
    config, model = build(CONFIGS[name], workload)
    flops = flops_per_token(config, workload.context_length)
    planned = (flops.total + (flops.recomputed if workload.checkpointing else 0)) * workload.tokens
    # FLOPs that the counter does not see, as `flops_per_token` explains.
    if workload.precision == "fp32":
        planned -= 2 * config.padded_vocab_size * config.hidden_size * workload.tokens
    if not materializes_attention_scores(config, workload):
        planned -= flops.attention / 6 * (8 if workload.checkpointing else 6) * workload.tokens
    with FlopCounterMode(display=False) as counter:
        forward(model, workload).backward()
    assert planned == counter.get_total_flops()


def test_torch_counts_one_more_product_for_cuda_fused_attention():
    config = ScratchGPTConfig(**SIZE)
    shape = (1, config.num_attention_heads, 128, config.head_dim)
    counted = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    planned = flops_per_token(config, 128).attention * 128 / config.num_hidden_layers
    assert counted == planned * 7 / 6


@pytest.mark.parametrize("name", ["modern, grouped queries", "gpt2", "untied head", "softcap"])
@every_workload
def test_planned_total_is_the_peak_of_a_step_with_accumulated_gradients(name, workload):
    config, model = build(CONFIGS[name], workload)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward(model, workload).backward()
    optimizer.step()
    tracker = MemTracker()  # tracks every allocated tensor
    tracker.track_external(model, optimizer)
    with tracker:
        forward(model, workload).backward()
    peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    planned = estimate_memory(config, parameter_counts(config), Layout("single", 1, ""), workload).total
    assert planned == pytest.approx(peak, rel=0.05)


@every_config
def test_weights_gradients_and_optimizer_state_are_exact(name):
    workload = Workload(2, 32, "fp32", "cpu")
    config, model = build(CONFIGS[name], workload)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward(model, workload).backward()
    optimizer.step()
    planned = estimate_memory(config, parameter_counts(config), Layout("single", 1, ""), workload)
    assert planned.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert planned.optimizer == sum(value.nbytes for value in moments)


def test_muon_keeps_one_momentum_of_the_projections():
    workload = Workload(2, 32, "fp32", "cpu")
    config, model = build(GPT2, workload)
    forward(model, workload).backward()
    named = dict(model.named_parameters())
    matrices = [parameter for name, parameter in named.items() if name.endswith("_proj.weight")]
    rest = [parameter for name, parameter in named.items() if not name.endswith("_proj.weight")]
    held = 0
    for optimizer in (torch.optim.Muon(matrices), torch.optim.AdamW(rest)):
        optimizer.step()
        held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert optimizer_state_bytes(parameter_counts(config), "muon") == held


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_exact_and_add_up(name):
    config = preset(name)
    parameters = parameter_counts(config)
    assert parameters.total == count_parameters(config)
    tables = config.padded_vocab_size + (
        config.max_position_embeddings if config.position_embedding_type == "learned" else 0
    )
    assert parameters.embeddings == tables * config.hidden_size
    assert (parameters.head > 0) == (not config.tie_word_embeddings)


def test_fp16_needs_the_memory_of_bf16_and_fp8_that_without_weight_copies():
    plan = Plan(replace(settings(), devices=1))
    half, fp16, fp8 = (plan.estimate(Layout("single", 1, ""), each, False) for each in ("bf16", "fp16", "fp8"))
    assert fp16.memory == half.memory
    copies = plan.config.num_hidden_layers * autocast_weight_copies(plan.config).size(half.workload)
    assert fp8.memory == replace(half.memory, activations=half.memory.activations - copies)


def test_fsdp2_shards_have_the_planned_size():
    from torch.distributed.fsdp import fully_shard

    config, model = build({"vocab_size": 2048}, Workload(1, 1))
    with fake_process_group(4):
        mesh = dist.init_device_mesh("cpu", (4,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    layout = next(layout for layout in possible_layouts(config, 4, 8) if layout.name == "fsdp2")
    planned = estimate_memory(config, parameter_counts(config), layout, Workload(1, 32))
    assert planned.weights == pytest.approx(held, rel=0.05)


def test_more_shards_never_need_more_memory_for_what_is_sharded():
    config = preset("modern-1b")
    parameters, workload = parameter_counts(config), Workload(1, 1024)
    by_name = {
        layout.name: estimate_memory(config, parameters, layout, workload) for layout in possible_layouts(config, 16, 8)
    }
    assert list(by_name) == ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp", "fsdp2 x tp8"]
    assert by_name["ddp"].weights == by_name["single"].weights == 4 * parameters.total
    assert by_name["fsdp2"].weights == by_name["ddp"].weights / 16
    assert by_name["hsdp"].weights == by_name["ddp"].weights / 8
    assert by_name["zero2"].gradients == by_name["zero1"].gradients / 16
    # 16 bytes per parameter in all, as under fsdp2; with unsharded weights also a copy of those that a rank updates
    zero2, zero3 = by_name["zero2"], by_name["zero3"]
    assert (zero3.weights + zero3.gradients + zero3.optimizer) * 16 == 16 * parameters.total
    assert zero2.optimizer == zero3.optimizer + 4 * parameters.total / 16
    assert by_name["fsdp2 x tp8"].activations < by_name["fsdp2"].activations


def test_largest_fitting_batch_is_the_last_that_fits():
    for limit in (0.5, 1, 2, 3, 1000, 1023, 1024, 1025):
        assert largest_fitting_batch(lambda sequences: sequences, limit) == int(limit)


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
def test_simplest_layout_that_fits_is_chosen(memory_of_a_device, devices, layout, checkpointing):
    plan = Plan(replace(settings(), device_memory=memory_of_a_device, devices=devices))
    estimates = plan.estimates("bf16")
    chosen = plan.choose(estimates)
    text = "\n".join(describe(plan))
    if layout is None:
        assert chosen is None
        assert "none fits" in text
        return
    assert (chosen.layout.name, chosen.workload.checkpointing) == (layout, checkpointing)
    batch = plan.device_batch_size(chosen)
    assert 1 <= batch <= chosen.max_batch_size
    assert plan.sequences_per_step(chosen.layout) % batch == 0
    assert f"layout     {layout} " in text
    assert f"--training.device_batch_size {batch}:" in text


def test_time_and_cost_follow_from_flops_and_mfu():
    plan = Plan(replace(settings(), tokens=1e9, mfu=0.5))
    none, full = plan.estimates("bf16")[2:4]
    flops = flops_per_token(plan.config, 1024)
    assert plan.tokens_per_second(none) == pytest.approx(8 * 1e15 * 0.5 / flops.total)
    assert plan.tokens_per_second(full) == pytest.approx(8 * 1e15 * 0.5 / (flops.total + flops.recomputed))
    hours = 1e9 / plan.tokens_per_second(none) / 3600
    text = "\n".join(describe(plan))
    assert f"1,000,000,000 tokens: {hours * 60:.1f} minutes" in text
    assert f"cost {hours * 8 * 2:,.2f}" in text
    assert f"{20 * plan.parameters.total:,} tokens, 20 per parameter" in text


def test_time_is_unknown_without_peak_flops():
    plan = Plan(replace(settings(), peak_flops=None))
    text = "\n".join(describe(plan))
    assert "time unknown" in text
    assert "tokens/s (" not in text


def test_plan_accepts_the_config_of_a_run(tmp_path, capsys):
    from scratch_gpt.cli import main

    run = parse_settings(PretrainSettings, ["--tokenizer.vocab_size", "1000", "--training.context_length", "64"], "x")
    save_settings(run, tmp_path / "config.yaml")
    assert main(["plan", "--config", str(tmp_path / "config.yaml"), "--device-memory", "8GB"]) == 0
    printed = capsys.readouterr().out
    assert f"{count_parameters(preset('modern-2m', vocab_size=1000)):,} parameters" in printed
    assert "context length 64" in printed
    planned = parse_settings(PlanSettings, ["--config", str(tmp_path / "config.yaml")], "x")
    assert {name: asdict(planned)[name] for name in asdict(run)} == asdict(run)


def test_total_batch_size_that_pretrain_would_refuse_is_reported():
    text = "\n".join(describe(Plan(settings(training={"total_batch_size": 1000}))))
    assert "total_batch_size 1,000 is not a multiple of 1,024 (context length) x 8 (data-parallel ranks)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("512 mb", 512 * 10**6), ("1.5TB", 15 * 10**11), ("1024", 1024)],
)
def test_memory_amounts_are_parsed(text, expected):
    assert parse_bytes(text, "device-memory") == expected


@pytest.mark.parametrize("text", ["", "GB", "80 gigs", "-1GB", "0GB", "80GBs"])
def test_invalid_memory_amounts_are_refused_with_the_option(text):
    with pytest.raises(UserError, match="--device-memory is"):
        parse_bytes(text, "device-memory")
