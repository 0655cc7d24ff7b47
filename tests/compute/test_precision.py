"""Which precisions are taken where, and what is said of those that are not."""

import importlib.util
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scratch_gpt.cli import main
from scratch_gpt.compute import float8
from scratch_gpt.compute.compile import compile_blocks
from scratch_gpt.compute.precision import _cpu_emulates_bf16, autocast, check_precision
from scratch_gpt.config import TrainingSettings
from scratch_gpt.data.batches import read_rows
from scratch_gpt.data.packing import pack
from scratch_gpt.errors import UserError
from scratch_gpt.planning.dry_run import fake_process_group, fake_strategy
from scratch_gpt.training import build, pretrain
from scratch_gpt.training.autotune import PrecisionChoice, autotune, candidate_precisions
from tests.tiny import random_stream, tiny_model
from tests.training.runs import arguments

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(major, minor, torchao)``: a machine with this compute capability, with or without the package."""

    def pretend(major, minor, torchao=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8)
        spec = importlib.util.find_spec("json") if torchao else None
        monkeypatch.setattr(float8, "find_spec", lambda name: spec)

    return pretend


@pytest.mark.parametrize(
    ("precision", "machine", "message"),
    [
        ("bf16", (7, 5), "bf16 needs a GPU of compute capability 8.0 or higher, and Some GPU would only emulate it"),
        ("fp8", (8, 0), "fp8 needs a GPU of compute capability 8.9 or higher .*this one has 8.0: take bf16 or auto"),
        ("fp8", (9, 0, False), "fp8 needs the package torchao: pip install 'scratch-gpt.fp8.'"),
    ],
)
def test_a_gpu_is_told_what_it_lacks(gpu, precision, machine, message):
    gpu(*machine)
    with pytest.raises(UserError, match=message):
        check_precision(precision, GPU)


@pytest.mark.parametrize("machine", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_a_gpu_takes_the_others(gpu, machine):
    gpu(*machine)
    taken = {"fp32", "fp16", "auto"} | ({"bf16"} if machine >= (8, 0) else set())
    for precision in taken | ({"fp8"} if machine >= (8, 9) else set()):
        check_precision(precision, GPU)
    assert candidate_precisions(GPU) == (["bf16"] if machine >= (8, 0) else ["fp32"])


@pytest.mark.parametrize("verb", ["pretrain", "find-batch-size"])
@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "fp16 needs a CUDA GPU, and this run is on cpu: there Accelerate computes in float32"),
        ("fp8", "fp8 needs a CUDA GPU, and this run is on cpu: take bf16 or auto"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_they_are_refused_before_anything_is_written(verb, precision, message, corpus, tmp_path, capsys):
    run = arguments(tmp_path / "run", corpus, "--training.precision", precision)
    assert main([verb, *run[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(emulates)``: a CPU that has instructions for bf16, or takes its time."""

    def pretend(emulates, original=torch.mm):
        def mm(one, other, **keywords):
            if keywords:  # the loss's
                return original(one, other, **keywords)
            time.sleep(0.02 * (emulates and one.dtype == torch.bfloat16))
            return original(one.float(), other.float())

        monkeypatch.setattr(torch, "mm", mm)
        _cpu_emulates_bf16.cache_clear()

    yield pretend
    _cpu_emulates_bf16.cache_clear()


@pytest.mark.parametrize("emulates", [False, True])
def test_a_cpu_takes_the_others_and_measures_those_it_has_instructions_for(
    cpu, emulates, corpus, tmp_path, monkeypatch, capsys
):
    cpu(emulates)
    for one in ("fp32", "bf16", "auto"):
        check_precision(one, CPU)
    assert candidate_precisions(CPU) == (["fp32"] if emulates else ["bf16", "fp32"])
    assert main([*arguments(tmp_path / "run", corpus, "--training.precision", "auto"), "--dry-run"]) == 0
    assert ("fp32, eager: bf16 is emulated here" in capsys.readouterr().out) == emulates
    with fake_process_group(2):
        monkeypatch.setattr(build, "build_strategy", lambda: fake_strategy({"dp_shard": 2}, "cpu"))
        assert main([*arguments(tmp_path / "sharded", corpus, "--training.precision", "auto"), "--dry-run"]) == 0
    assert f"{'fp32' if emulates else 'bf16'}, eager: not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.bfloat16)],
)
def test_matrix_products_have_the_precision_that_was_asked_for(precision, dtype):
    with autocast("cpu", precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_named_precision_is_not_measured_against_another():
    stream = random_stream()
    packing = pack(stream, "concat", 16, False, 0)
    batch = read_rows([(stream, packing.row(index)) for index in range(4)], 16, False)
    settings = TrainingSettings(precision="fp16", compile="off")
    choice = autotune(tiny_model().train(), batch, 1, settings, 10)
    assert (choice.precision, choice.reason) == ("fp16", "as requested")


def test_sizes_that_float8_does_not_take_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", SimpleNamespace(convert_to_float8_training=None))
    with pytest.raises(UserError, match=r"stay in bf16: attn.k_proj \(16 x 8\), attn.v_proj \(16 x 8\)\. Change"):
        float8.use_float8(tiny_model(num_key_value_heads=1, intermediate_size=64))
    with pytest.raises(UserError, match="3 rows x 24 tokens are 72: change"):
        float8.check_tokens(3, 24)
    float8.check_tokens(2, 24)


@pytest.mark.parametrize("here", [False, True])
def test_what_the_main_process_found_faster_all_do(here, corpus, tmp_path, monkeypatch):
    compiled = []

    def measure(model, *arguments):
        if here:
            compile_blocks(model)
        return PrecisionChoice("fp32", here, 0.1, "measured here")

    def look(pretraining):
        compiled.extend(block._compiled_call_impl is not None for block in pretraining.model.transformer.h)

    def broadcast(objects):
        objects[0] = PrecisionChoice("fp32", not here, 0.1, "measured there")

    monkeypatch.setattr(build, "autotune", measure)
    monkeypatch.setattr(build, "broadcast_object_list", broadcast)
    monkeypatch.setattr(pretrain, "describe", look)
    assert main([*arguments(tmp_path / "run", corpus), "--dry-run"]) == 0
    assert compiled and set(compiled) == {not here}


def test_compiled_blocks_are_refused_where_tensor_parallelism_divides_them(corpus, tmp_path, monkeypatch, capsys):
    assert main([*arguments(tmp_path / "run", corpus), "--max-steps", "4"]) == 0
    compiled = []

    def look(pretraining):
        compiled.extend(block._compiled_call_impl is not None for block in pretraining.model.transformer.h)

    def state_of_a_compiled_run(folder, original=build.read_state):
        return replace(original(folder), compiled=True)

    monkeypatch.setattr(pretrain, "describe", look)
    monkeypatch.setattr(build, "read_state", state_of_a_compiled_run)
    go_on = [*arguments(tmp_path / "run", corpus), "--dry-run"]
    assert main(go_on) == 0 and all(compiled)
    compiled.clear()
    with fake_process_group(2):
        monkeypatch.setattr(build, "build_strategy", lambda: fake_strategy({"tp": 2}, "cpu"))
        assert main(go_on) == 0 and compiled and not any(compiled)
        assert "except that fsdp2 x tp cannot compile blocks" in capsys.readouterr().out
        assert main([*arguments(tmp_path / "new", corpus), "--dry-run", "--training.compile", "on"]) == 2
    assert "torch's compiler does not take blocks whose matrices are divided" in capsys.readouterr().err
