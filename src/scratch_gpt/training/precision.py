"""What the model computes in: which precisions this machine has, and which arithmetic is fastest on it.

The speed is measured on the model and batch that will be trained, before the run starts.

Not every CPU has bf16 instructions, and one that emulates them takes up to a hundred times as long as in fp32, so that
bf16 is not even tried there. A CPU that has them may still be slower with them; a compiled block saves element-wise passes over
memory but takes half a minute to compile. So both are tried, and the choice is said.
"""

import functools
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scratch_gpt.config import TrainingSettings
from scratch_gpt.data.batches import Batch
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTForCausalLM
from scratch_gpt.training.float8 import check_float8

COMPILE_WORTH_TRYING_SECONDS = 240.0
"""Eager duration of a run from which on compiling is tried: below, the time to compile is not earned back."""

EMULATED = 4.0
"""How many times as long as in fp32 a product in bf16 takes at least, where it is emulated: 40 to 100 were measured."""


@dataclass
class Arithmetic:
    precision: str
    """fp32, or under autocast bf16, fp16 (with a loss scale) or fp8 (in the blocks, the rest in bf16)."""
    compiled: bool
    seconds_per_step: float
    """Measured forward + backward of one process's share of an optimizer step."""
    reason: str


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


def choose_arithmetic(
    model: ScratchGPTForCausalLM,
    batch: Batch,
    micro_batches: int,
    settings: TrainingSettings,
    max_steps: int | None,
    budget_seconds: float | None = None,
) -> Arithmetic:
    """Measure forward + backward on ``batch`` and leave ``model`` as it was, compiled if that is the choice.

    For fp8 the model must have its layers already.
    The length of the run, which decides whether compiling is tried, is ``max_steps``, else ``budget_seconds``.
    """
    rng = torch.get_rng_state()
    seconds: dict[str, float] = {}
    candidates = [settings.precision] if settings.precision != "auto" else _candidates(batch.input_ids.device)
    for precision in candidates:
        seconds[precision] = measure(model, batch, precision)
    precision = min(seconds, key=seconds.__getitem__)
    reason = "as asked" if settings.precision != "auto" else "the only choice"
    if settings.precision == "auto" and not has_bf16(batch.input_ids.device):
        reason = "bf16 is emulated here"
        if batch.input_ids.is_cuda:
            reason += "; --training.precision fp16 would be faster"
    if len(seconds) > 1:
        slower = max(seconds, key=seconds.__getitem__)
        reason = f"{seconds[slower] / seconds[precision]:.1f}x the speed of {slower} here"

    compiled = settings.compile == "on"
    eager_seconds = seconds[precision] * micro_batches
    run_seconds = eager_seconds * max_steps if max_steps is not None else budget_seconds or 0.0
    worth_trying = run_seconds > COMPILE_WORTH_TRYING_SECONDS and _has_compiler()
    if compiled or (settings.compile == "auto" and worth_trying):
        compile_blocks(model)
        seconds["compiled"] = measure(model, batch, precision)
        compiled = settings.compile == "on" or seconds["compiled"] < 0.95 * seconds[precision]
        if compiled:
            reason += f"; compiled blocks, {seconds[precision] / seconds['compiled']:.2f}x eager"
            eager_seconds = seconds["compiled"] * micro_batches
        else:
            uncompile_blocks(model)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(rng)
    return Arithmetic(precision, compiled, eager_seconds, reason)


def measure(model: ScratchGPTForCausalLM, batch: Batch, precision: str, repeats: int = 5) -> float:
    """Median seconds of one forward + backward, after a first one that is not counted."""
    seconds = [_timed(lambda: _forward_backward(model, batch, precision)) for _ in range(repeats + 1)]
    return statistics.median(seconds[1:])


def _forward_backward(model: ScratchGPTForCausalLM, batch: Batch, precision: str) -> None:
    device = batch.input_ids.device.type
    with autocast(device, precision):
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            shift_labels=batch.labels,
        ).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _candidates(device: torch.device) -> list[str]:
    if device.type not in ("cpu", "cuda") or not has_bf16(device):
        return ["fp32"]
    return ["bf16", "fp32"] if device.type == "cpu" else ["bf16"]


def _has_compiler() -> bool:
    return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))


def compile_blocks(model: ScratchGPTForCausalLM) -> None:
    """torch.compile each block in place: one graph for all of them, names in the state dict unchanged."""
    for block in model.transformer.h:
        block.compile()


def uncompile_blocks(model: ScratchGPTForCausalLM) -> None:
    for block in model.transformer.h:
        block._compiled_call_impl = None
