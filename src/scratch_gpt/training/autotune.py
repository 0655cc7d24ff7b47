"""Choose the precision, and whether blocks are compiled, by what trains fastest on this machine.

Measured before the run starts, on the model and the micro-batch that it will train on.
"""

import shutil
import statistics
from dataclasses import dataclass

import torch

from scratch_gpt.compute.compile import compile_blocks, uncompile_blocks
from scratch_gpt.compute.precision import autocast, has_bf16, measure_seconds
from scratch_gpt.config import TrainingSettings
from scratch_gpt.data.batches import Batch
from scratch_gpt.model import ScratchGPTForCausalLM

MIN_SECONDS_TO_TRY_COMPILING = 240.0
"""A run that takes less than this eagerly would not earn back the time to compile."""
MAX_COMPILED_TIME_RATIO = 0.95
"""Compiled blocks are kept if they take less than this times the eager time."""


@dataclass
class PrecisionChoice:
    """The precision of a run, whether its blocks are compiled, and the reason."""

    precision: str
    """fp32, or under autocast bf16, fp16 (with loss scaling) or fp8 (in the blocks; the rest in bf16)."""
    compiled: bool
    """Whether the blocks are compiled."""
    seconds_per_step: float
    """Measured forward and backward time of one process in an optimizer step; 0 where nothing was measured."""
    reason: str
    """For the console."""


def autotune(
    model: ScratchGPTForCausalLM,
    batch: Batch,
    micro_batches: int,
    training: TrainingSettings,
    max_steps: int | None,
    budget_seconds: float | None = None,
) -> PrecisionChoice:
    """Measure forward and backward on ``batch`` for every candidate; leave ``model`` compiled if that is the choice.

    Args:
        model: for fp8, already with its float8 layers.
        batch: one micro-batch, on the device of the model.
        micro_batches: micro-batches per optimizer step and process.
        max_steps: steps of the run. Its duration decides whether compiling is tried.
        budget_seconds: duration of the run, where ``max_steps`` is not known yet.
    """
    device, rng_state = batch.input_ids.device, torch.get_rng_state()
    candidates = [training.precision] if training.precision != "auto" else candidate_precisions(device)
    seconds = {precision: measure_forward_backward(model, batch, precision) for precision in candidates}
    precision = min(seconds, key=seconds.__getitem__)
    reason = _explain(training.precision, seconds, device)

    compiled = False
    eager_seconds = seconds[precision]
    seconds_per_step = eager_seconds * micro_batches
    run_seconds = seconds_per_step * max_steps if max_steps is not None else budget_seconds or 0.0
    worth_trying = run_seconds > MIN_SECONDS_TO_TRY_COMPILING and _has_compiler()
    if training.compile == "on" or (training.compile == "auto" and worth_trying):
        compile_blocks(model)
        compiled_seconds = measure_forward_backward(model, batch, precision)
        compiled = training.compile == "on" or compiled_seconds < MAX_COMPILED_TIME_RATIO * eager_seconds
        if compiled:
            reason += f"; compiled blocks, {eager_seconds / compiled_seconds:.2f}x eager"
            seconds_per_step = compiled_seconds * micro_batches
        else:
            uncompile_blocks(model)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(rng_state)
    return PrecisionChoice(precision, compiled, seconds_per_step, reason)


def candidate_precisions(device: torch.device) -> list[str]:
    """The precisions that are worth measuring on ``device``."""
    if device.type not in ("cpu", "cuda") or not has_bf16(device):
        return ["fp32"]
    return ["bf16", "fp32"] if device.type == "cpu" else ["bf16"]


def measure_forward_backward(model: ScratchGPTForCausalLM, batch: Batch, precision: str, repeats: int = 5) -> float:
    """Median seconds of one forward and backward pass, after one to warm up."""
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


def _explain(requested: str, seconds: dict[str, float], device: torch.device) -> str:
    if requested != "auto":
        return "as requested"
    if not has_bf16(device):
        advice = "; --training.precision fp16 would be faster" if device.type == "cuda" else ""
        return f"bf16 is emulated here{advice}"
    if len(seconds) == 1:
        return "the only choice"
    fastest, slowest = min(seconds.values()), max(seconds, key=seconds.__getitem__)
    return f"{seconds[slowest] / fastest:.1f}x the speed of {slowest} here"


def _has_compiler() -> bool:
    return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))
