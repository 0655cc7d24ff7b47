"""What a run tells of its speed: model FLOPs utilisation, and the progress line."""

import json
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from scratch_gpt import console
from scratch_gpt.cli import main
from scratch_gpt.compute import mfu as utilisation
from scratch_gpt.compute.mfu import GPU_PEAKS, MFUMeter, data_sheet_peak, measured_peak
from scratch_gpt.model.presets import preset
from scratch_gpt.training.metrics import format_speed, read_metrics
from tests.training.runs import arguments


def test_mfu_is_the_models_flops_per_second_over_the_peak(monkeypatch, corpus, tmp_path, capsys):
    monkeypatch.setattr(utilisation, "measured_peak", lambda precision: {"fp32": 1e9}[precision])
    assert main(arguments(tmp_path / "run", corpus)) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    width, keys, mlp = 32, 16, 64
    matrices = 2 * (2 * width * width + 2 * width * keys + 3 * width * mlp) + config["vocab_size"] * width
    per_token = 6 * matrices + 12 * 2 * 32 * width
    for record in records:
        assert record["mfu"] == pytest.approx(per_token * record["tokens_per_second"] / 1e9, abs=1e-4)
    assert f"{format_speed(records[-1])}  0:00 left" in capsys.readouterr().out
    assert f"MFU {records[-1]['mfu']:.0%}" in format_speed(records[-1])


def test_the_measured_peak_is_what_a_linear_layer_reaches():
    layer, rows, seconds = torch.nn.Linear(1024, 1024, bias=False), torch.ones(1024, 1024), []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(rows)
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            layer(rows)
            seconds.append(time.perf_counter() - start)
    utilisation._measured_peak.cache_clear()
    assert 0.5 < measured_peak("fp32") * min(seconds) / counter.get_total_flops() < 3


def test_where_a_product_takes_its_time_larger_ones_are_left_out(monkeypatch):
    timed = []
    monkeypatch.setattr(utilisation, "_product_speed", lambda side, dtype: timed.append(side) or 1e9)
    utilisation._measured_peak.cache_clear()
    assert measured_peak("bf16") == 1e9
    utilisation._measured_peak.cache_clear()
    assert timed == [min(utilisation.SIDES)]


def test_a_gpu_is_looked_up_by_its_whole_name():
    assert data_sheet_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert data_sheet_peak("NVIDIA H100 PCIe", "fp8") == 1513e12
    assert data_sheet_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert data_sheet_peak("NVIDIA A100 80GB PCIe", "fp32") == 19.5e12
    assert data_sheet_peak("Tesla T4", "fp16") == 65e12
    assert data_sheet_peak("NVIDIA L4", "fp16") == 121e12
    assert data_sheet_peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    for unknown in ("NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU"):
        assert data_sheet_peak(unknown, "bf16") is None
    for name, half, fp8, fp32 in GPU_PEAKS:
        assert fp32 < half and fp8 in (None, pytest.approx(2 * half, rel=0.03)), name  # dense, none with sparsity


def test_an_unknown_peak_is_no_number(monkeypatch, corpus, tmp_path, capsys):
    monkeypatch.setattr(utilisation, "measured_peak", lambda precision: None)
    assert main([*arguments(tmp_path / "run", corpus), "--max-steps", "1"]) == 0
    [record] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["mfu"] is None
    assert "MFU" not in capsys.readouterr().out


def test_the_peaks_of_all_processes_add_up(monkeypatch):
    class Two(Accelerator):
        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            return tensor + 3e9

    monkeypatch.setattr(utilisation, "measured_peak", lambda precision: 1e9)
    flops = MFUMeter(Two(cpu=True), preset("modern-2m"), 256, "bf16")
    assert flops.peak == pytest.approx(4e9)
    assert flops.mfu(flops.peak / flops.per_token) == 1.0


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress_bar("x", 100) as bar:
        for step in range(1, 100):
            now[0] += 10
            bar.update(step, f"step {step}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [str(step) for step in range(6, 100, 6)]


def test_on_a_terminal_the_bar_shows_loss_speed_and_time_left():
    program = """
import time
from rich.console import Console
from scratch_gpt import console
console.console = Console(force_terminal=True, width=120)
with console.progress_bar("pretraining", 10) as bar:
    for step in range(1, 8):
        time.sleep(0.05)
        bar.update(step, f"loss {step}.5  17,000 tokens/s")
    bar.progress.refresh()
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pretraining" in shown and "loss 7.5  17,000 tokens/s" in shown and "0:00:0" in shown
