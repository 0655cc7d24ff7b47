"""Which precision, and whether compiled blocks, train fastest on this machine: measured before the run starts."""

import shutil
import statistics
from dataclasses import dataclass

import torch

from scratch_gpt.compute.compile import compile_blocks, uncompile_blocks
from scratch_gpt.compute.precision import autocast, has_bf16, measure_seconds
from scratch_gpt.config import TrainingSettings
from scratch_gpt.data.batches import Batch
from scratch_gpt.model import ScratchGPTForCausalLM

COMPILE_WORTH_TRYING_SECONDS = 240.0
"""Eager duration of a run from which on compiling is tried: below, the time to compile is not earned back."""


@dataclass
class PrecisionChoice:
    precision: str
    """fp32, or under autocast bf16, fp16 (with a loss scale) or fp8 (in the blocks, the rest in bf16)."""
    compiled: bool
    seconds_per_step: float
    """Measured forward + backward of one process's share of an optimizer step."""
    reason: str


def autotune(
    model: ScratchGPTForCausalLM,
    batch: Batch,
    micro_batches: int,
    settings: TrainingSettings,
    max_steps: int | None,
    budget_seconds: float | None = None,
) -> PrecisionChoice:
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
    return PrecisionChoice(precision, compiled, eager_seconds, reason)


def measure(model: ScratchGPTForCausalLM, batch: Batch, precision: str, repeats: int = 5) -> float:
    """Median seconds of one forward + backward, after a first one that is not counted."""
    seconds = [measure_seconds(lambda: _forward_backward(model, batch, precision)) for _ in range(repeats + 1)]
    return statistics.median(seconds[1:])


def _forward_backward(model: ScratchGPTForCausalLM, batch: Batch, precision: str) -> None:
    device = batch.input_ids.device.type
    with autocast(device, precision):
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            shift_labels=batch.targets,
        ).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _candidates(device: torch.device) -> list[str]:
    if device.type not in ("cpu", "cuda") or not has_bf16(device):
        return ["fp32"]
    return ["bf16", "fp32"] if device.type == "cpu" else ["bf16"]


def _has_compiler() -> bool:
    return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))
