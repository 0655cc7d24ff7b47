"""Model FLOPs utilization (MFU): the FLOP/s that the model needs, divided by the peak of the devices.

Chowdhery et al., 2022, arXiv:2204.02311, appendix B: recomputed activations do not count. A CPU's peak is measured, because
it depends on the threads and on other load; a GPU's is looked up.
"""

import functools
import math
import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.flops import flops_per_token

TERA = 1e12

# Dense peaks in TFLOP/s from NVIDIA's data sheets (half of the numbers that are given with sparsity):
# name as reported by the driver, bf16 and fp16 on tensor cores with float32 accumulation, fp8 likewise, float32 without TF32.
GPU_PEAKS: list[tuple[str, float, float | None, float]] = [
    # B200: data sheet "NVIDIA HGX B200", per GPU
    (r"B200", 2250, 4500, 75),
    # H200 and GH200 have the GH100 chip of the H100 SXM: data sheets "H200 Tensor Core GPU", "GH200 Grace Hopper"
    (r"H200", 989, 1979, 67),
    (r"H200 NVL", 835.5, 1670.5, 60),
    (r"GH200( \d+GB)?", 989, 1979, 67),
    # H100: data sheet "NVIDIA H100 Tensor Core GPU"; the SXM module names its memory, the cards their form
    (r"H100( SXM5)? \d+GB HBM3e?", 989, 1979, 67),
    (r"H100 PCIe", 756.5, 1513, 51),
    (r"H100 NVL", 835.5, 1670.5, 60),
    # A100: data sheet "NVIDIA A100 Tensor Core GPU", the same for SXM and PCIe, 40 and 80 GB
    (r"A100-(SXM4|SXM|PCIE)-\d+GB|A100 80GB PCIe", 312, None, 19.5),
    # Ada: data sheets "NVIDIA L4", "NVIDIA L40", "NVIDIA L40S"
    (r"L4", 121, 242.5, 30.3),
    (r"L40", 181, 362, 90.5),
    (r"L40S", 362, 733, 91.6),
    # Ampere: data sheets "NVIDIA A10", "NVIDIA A40"
    (r"A10", 125, None, 31.2),
    (r"A40", 149.7, None, 37.4),
    # GeForce accumulates in float32 at half the rate: whitepapers of GA102, Ada and RTX Blackwell, appendix A each
    (r"GeForce RTX 3090", 71, None, 35.6),
    (r"GeForce RTX 3090 Ti", 80, None, 40),
    (r"GeForce RTX 4090", 165.2, 330.3, 82.6),
    (r"GeForce RTX 5090", 209.5, 419, 104.8),
    # no bf16 before Ampere: data sheets "NVIDIA V100", "NVIDIA T4"
    (r"V100-SXM[23]-\d+GB(-LS)?", 125, None, 15.7),
    (r"V100-PCIE-\d+GB", 112, None, 14),
    (r"V100S-PCIE-\d+GB", 130, None, 16.4),
    (r"T4", 65, None, 8.1),
]
MATRIX_SIZES = (1024, 2048)
"""Sizes of the square matrices whose products are timed; which is faster depends on the machine."""
SECONDS_PER_SIZE = 0.15
"""Duration of the timing of each size, in seconds; if one product takes longer, as emulated ones do, larger sizes are skipped."""


class MFUMeter:
    """Peak of all processes and FLOPs per token. All ranks build one together, because those of a machine share its cores."""

    def __init__(self, accelerator: Accelerator, config: ScratchGPTConfig, context_length: int, precision: str):
        self.per_token = flops_per_token(config, context_length).total
        self.peak: float | None = None
        """FLOP/s of all processes, or None if unknown."""
        accelerator.wait_for_everyone()
        local = (
            measured_peak(precision) if accelerator.device.type == "cpu" else gpu_peak(accelerator.device, precision)
        )
        total = accelerator.reduce(torch.tensor(local or float("nan"), device=accelerator.device), "sum").item()
        if not math.isnan(total):  # one unknown peak makes the sum unknown
            self.peak = total

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the MFU, between 0 and 1, at a speed of all processes; None if the peak is unknown."""
        return None if self.peak is None else round(self.per_token * tokens_per_second / self.peak, 4)


def gpu_peak(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s of a CUDA ``device``; None for an unknown GPU or another type of device."""
    return data_sheet_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def data_sheet_peak(name: str, precision: str) -> float | None:
    """Return the FLOP/s of the GPU that the driver calls ``name``; None if it is not in the table, such as a MIG slice."""
    for pattern, half, fp8, fp32 in GPU_PEAKS:
        if re.fullmatch(rf"(NVIDIA |Tesla )?({pattern})", name):
            peak = {"fp32": fp32, "fp8": fp8}.get(precision, half)
            return None if peak is None else peak * TERA
    return None


def measured_peak(precision: str) -> float:
    """Return the FLOP/s of matrix products on this process's threads: the median, for the faster size, measured once."""
    return _measured_peak(torch.float32 if precision == "fp32" else torch.bfloat16, torch.get_num_threads())


@functools.cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    speeds: list[float] = []
    for size in MATRIX_SIZES:
        speeds.append(_product_speed(size, dtype))
        if 2 * size**3 / speeds[-1] > SECONDS_PER_SIZE:
            break
    return max(speeds)


def _product_speed(size: int, dtype: torch.dtype) -> float:
    left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=product)
    seconds: list[float] = []
    while sum(seconds) < SECONDS_PER_SIZE:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def hardware() -> str:
    """Return the names and numbers of GPUs or CPU cores of this machine, as in "8 x NVIDIA H100 80GB HBM3"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{os.cpu_count()} CPU cores ({name})"
