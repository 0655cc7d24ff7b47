"""The precisions in which a model can compute, and which of them this machine has.

A CPU without bf16 instructions emulates them, up to a hundred times slower than fp32. Which of the available precisions is
fastest is measured by `training/autotune.py`.
"""

import functools
import time
from collections.abc import Callable

import torch

from scratch_gpt.compute.float8 import check_float8
from scratch_gpt.errors import UserError

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The dtype to which autocast casts weights; float8 layers round from it."""
EMULATION_SLOWDOWN = 4.0
"""If a bf16 product takes this many times as long as in fp32, it is emulated; 40 to 100 were measured."""


def check_precision(precision: str, device: torch.device) -> None:
    """Check that this machine has ``precision``, without emulation.

    Raises:
        UserError: It does not; the message says what is missing and what to take instead.
    """
    if precision == "fp8":
        check_float8(device)
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"precision fp16 needs a CUDA GPU, and this run is on {device.type}: there Accelerate silently computes in "
            "float32. Take bf16 or auto"
        )
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(
            f"precision bf16 needs a GPU of compute capability 8.0 or higher, and {torch.cuda.get_device_name(device)} "
            "would only emulate it, slower than fp32: take fp16 or fp32"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` has bf16 without emulation."""
    if device.type == "cpu":
        return not _cpu_emulates_bf16()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _cpu_emulates_bf16(side: int = 256) -> bool:
    """Measure a small matrix product, because torch does not say which instructions it uses.

    On one thread: several would wait for each other where other work shares the cores.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, dtype=dtype)
        return min(measure_seconds(lambda: torch.mm(matrix, matrix)) for _ in range(5))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(torch.bfloat16) > EMULATION_SLOWDOWN * seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def autocast(device: str, precision: str) -> torch.autocast:
    """Return the autocast context of ``precision`` for a type of device; for fp32 it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=precision != "fp32")


def measure_seconds(action: Callable[[], object]) -> float:
    """Run ``action`` once and return the seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
