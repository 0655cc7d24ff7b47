"""What the model computes in: which precisions this machine has, and which arithmetic is fastest on it.

The speed is measured on the model and batch that will be trained, before the run starts.

Not every CPU has bf16 instructions, and one that emulates them takes up to a hundred times as long as in fp32, so that
bf16 is not even tried there. A CPU that has them may still be slower with them; a compiled block saves element-wise passes over
memory but takes half a minute to compile. So both are tried, and the choice is said.
"""

import functools
import time
from collections.abc import Callable

import torch

from scratch_gpt.compute.float8 import check_float8
from scratch_gpt.errors import UserError

EMULATED = 4.0
"""How many times as long as in fp32 a product in bf16 takes at least, where it is emulated: 40 to 100 were measured."""


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what this machine does not have, or only seems to have.

    Raises:
        UserError: says what is missing, and what to take instead.
    """
    if precision == "fp8":
        check_float8(device)
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"precision fp16 needs a CUDA GPU, and this run is on {device.type}: there Accelerate computes in float32 "
            "without a word. Take bf16 or auto"
        )
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError(
            f"precision bf16 needs a GPU of compute capability 8.0 or higher, and {torch.cuda.get_device_name(device)} "
            "would only emulate it, slower than fp32: take fp16 or fp32"
        )


def has_bf16(device: torch.device) -> bool:
    """False where bf16 is emulated, on a GPU or a CPU."""
    if device.type == "cpu":
        return not _cpu_emulates_bf16()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _cpu_emulates_bf16(side: int = 256) -> bool:
    """By the time of a small matrix product on one thread, for several wait for each other where other work shares the cores:
    torch does not say which instructions its products use.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, dtype=dtype)
        return min(_timed(lambda: torch.mm(matrix, matrix)) for _ in range(5))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(torch.bfloat16) > EMULATED * seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def autocast(device: str, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=precision != "fp32")


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
