"""`scratch-gpt find-batch-size`: the largest device batch, found by running real steps until memory runs out.

    scratch-gpt find-batch-size --model.preset modern-30m --training.context_length 512 --max-memory 4GB

Each trial runs in its own process, so that a process which the system kills for its memory counts as a trial that did
not fit.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
from scratch_gpt.compute.float8 import use_float8
from scratch_gpt.compute.precision import autocast, check_precision, has_bf16
from scratch_gpt.config import FindBatchSizeSettings, parse_bytes
from scratch_gpt.console import print0
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.errors import UserError
from scratch_gpt.planning.memory import GB
from scratch_gpt.planning.planner import planned_config, planned_context_length
from scratch_gpt.training.out_of_memory import is_out_of_memory, memory_advice

TIMED_STEPS = 3


@dataclass(frozen=True)
class Trial:
    """The result of a few steps with one device batch size."""

    batch_size: int
    fits: bool
    failure: str = ""
    """Why it does not fit."""
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    """On CPU of the entire process, with Python and its libraries; on CUDA of the tensors only."""


def find_batch_size_command(settings: FindBatchSizeSettings) -> None:
    """`scratch-gpt find-batch-size`.

    Raises:
        UserError: not even one sequence fits.
    """
    config, vocabulary_source = planned_config(settings)
    context_length = planned_context_length(settings.training.context_length, config)
    limit = _memory_limit(settings.max_memory)
    device = _device()
    check_precision(settings.training.precision, torch.device(device))
    print0(
        f"{settings.model.preset}, vocabulary {config.vocab_size:,} ({vocabulary_source}), context length "
        f"{context_length:,}, {planned_precision(settings.training.precision, device)} on {device}, at most "
        f"{limit / GB:.1f} GB"
    )

    def attempt(batch_size: int) -> Trial:
        trial = run_in_subprocess(run_trial, settings, batch_size, limit)
        result = trial.failure
        if trial.fits:
            result = f"{trial.tokens_per_second:10,.0f} tokens/s   peak {trial.peak_bytes / GB:6.2f} GB"
        print0(f"  device batch size {batch_size:5,}   {result}")
        return trial

    fitting = [trial for trial in search_batch_size(attempt, settings.max_batch_size) if trial.fits]
    if not fitting:
        raise UserError(
            f"not even one sequence of {context_length:,} tokens fits into {limit / GB:.1f} GB: "
            f"{memory_advice(1, None, settings.training.context_length)}"
        )
    largest = max(fitting, key=lambda trial: trial.batch_size)
    fastest = max(fitting, key=lambda trial: trial.tokens_per_second)
    at_limit = " (the limit set by --max-batch-size)" if largest.batch_size == settings.max_batch_size else ""
    print0(
        f"largest    --training.device_batch_size {largest.batch_size}{at_limit}: "
        f"{largest.tokens_per_second:,.0f} tokens/s"
    )
    if fastest.batch_size != largest.batch_size:
        print0(
            f"fastest    --training.device_batch_size {fastest.batch_size}: {fastest.tokens_per_second:,.0f} tokens/s"
        )


def search_batch_size(attempt: Callable[[int], Trial], max_batch_size: int) -> list[Trial]:
    """Try 1, 2, 4, ... up to ``max_batch_size``; after the first that does not fit, bisect the interval before it."""
    trials = [attempt(1)]
    while trials[-1].fits and trials[-1].batch_size < max_batch_size:
        trials.append(attempt(min(2 * trials[-1].batch_size, max_batch_size)))
    if trials[-1].fits:
        return trials
    low, high = max((trial.batch_size for trial in trials if trial.fits), default=0), trials[-1].batch_size
    while high - low > 1:
        middle = (low + high) // 2
        trials.append(attempt(middle))
        low, high = (middle, high) if trials[-1].fits else (low, middle)
    return trials


def run_in_subprocess(
    function: Callable[..., Trial], settings: FindBatchSizeSettings, batch_size: int, limit: int
) -> Trial:
    """Call ``function(settings, batch_size, limit)`` in a new process; if a signal ends it, the batch does not fit.

    Raises:
        RuntimeError: it failed for another reason than memory; its traceback is on the error stream.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, settings, batch_size, limit), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
    if process.exitcode is not None and process.exitcode < 0:
        failure = f"out of memory: signal {-process.exitcode} ended the process"
        return Trial(batch_size, fits=False, failure=failure)
    raise RuntimeError(f"the trial of device batch size {batch_size} failed, see the traceback above")


def _send_result(sender: Connection, function: Callable[..., Trial], *arguments: Any) -> None:
    sender.send(function(*arguments))


def run_trial(settings: FindBatchSizeSettings, batch_size: int, limit: int) -> Trial:
    """Run one warm-up and ``TIMED_STEPS`` timed steps, keeping gradients as gradient accumulation does."""
    device = _device()
    config, _ = planned_config(settings)
    context_length = planned_context_length(settings.training.context_length, config)
    try:
        _limit_process_memory(limit, device)
        model = build_model(config, settings.seed).to(device).train()
        enable_activation_checkpointing(model, settings.training)
        if settings.training.precision == "fp8":
            use_float8(model)
        optimizer = build_optimizer(model, settings.training)
        ids = torch.randint(config.vocab_size, (batch_size, context_length), device=device)
        mixed_precision = autocast(device, planned_precision(settings.training.precision, device))
        seconds = []
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            with mixed_precision:
                loss = model(input_ids=ids, labels=ids, shift_labels=ids).loss
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Trial(batch_size, fits=False, failure="out of memory", peak_bytes=peak_memory(device))
    peak = peak_memory(device)
    if peak > limit:
        return Trial(batch_size, fits=False, failure=f"out of memory: it used {peak / GB:.2f} GB", peak_bytes=peak)
    tokens_per_second = batch_size * context_length / statistics.median(seconds[1:])
    return Trial(batch_size, fits=True, tokens_per_second=tokens_per_second, peak_bytes=peak)


def planned_precision(precision: str, device: str) -> str:
    """The precision that `pretrain` would use, except that auto means bf16 where supported, without measuring."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(torch.device(device)) else "fp32"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_limit(max_memory: str | None) -> int:
    """Bytes a trial may use. Default: the memory that is free now."""
    if max_memory is not None:
        return parse_bytes(max_memory, "max-memory")
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _limit_process_memory(limit: int, device: str) -> None:
    """Make allocations beyond ``limit`` bytes fail, so that other processes on the machine keep their memory."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    elif sys.platform == "linux":
        import resource

        used = psutil.Process().memory_info()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = used.data + max(limit - used.rss, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard < 0 else min(soft, hard), hard))


def peak_memory(device: str) -> int:
    """Largest number of bytes that this process has used so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage may report more: its value survives exec, so it includes the program before
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
