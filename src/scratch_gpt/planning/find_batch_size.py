"""The largest device batch, found by trying: real steps of larger and larger batches until memory runs out.

    scratch-gpt find-batch-size --model.preset modern-30m --training.context_length 512 --max-memory 4GB

Each try is a process of its own, so that one that the system kills for its memory is an answer like any other. Beside it
`out_of_memory_advice`: what to say when a run itself meets its limit.
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
from scratch_gpt.config import FindBatchSizeSettings, PretrainSettings, parse_bytes
from scratch_gpt.console import print0
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.distributed.optimizer import build_optimizer
from scratch_gpt.errors import UserError
from scratch_gpt.planning.plan import GB, planned_config, planned_context
from scratch_gpt.training.out_of_memory import is_out_of_memory, memory_advice

TIMED_STEPS = 3


@dataclass(frozen=True)
class Try:
    """One device batch, and how it went."""

    rows: int
    fits: bool
    why_not: str = ""
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    """On CPU of the whole process, Python and its libraries included; on CUDA of the tensors."""


def find_batch_size_command(settings: FindBatchSizeSettings) -> None:
    """`scratch-gpt find-batch-size`.

    Raises:
        UserError: not even one row fits.
    """
    config, vocabulary = planned_config(settings)
    context = planned_context(settings, config)
    limit = _limit(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_precision(settings.training.precision, torch.device(device))
    print0(
        f"{settings.model.preset}, vocabulary {config.vocab_size:,} ({vocabulary}), context {context:,}, "
        f"{precision(settings, device)} on {device}, at most {limit / GB:.1f} GB"
    )

    def attempt(rows: int) -> Try:
        result = in_a_process(try_batch, settings, rows, limit)
        if result.fits:
            told = f"{result.tokens_per_second:10,.0f} tokens/s   peak {result.peak_bytes / GB:6.2f} GB"
        else:
            told = result.why_not
        print0(f"  {rows:5,} rows   {told}")
        return result

    fitting = [one for one in search(attempt, settings.max_batch_size) if one.fits]
    if not fitting:
        raise UserError(
            f"not even one row of {context:,} tokens fits into {limit / GB:.1f} GB: "
            f"{memory_advice(1, None, settings.training.context_length)}"
        )
    largest = max(fitting, key=lambda one: one.rows)
    fastest = max(fitting, key=lambda one: one.tokens_per_second)
    at_limit = " (the limit of this search, --max-batch-size)" if largest.rows == settings.max_batch_size else ""
    print0(
        f"largest    --training.device_batch_size {largest.rows}{at_limit}: {largest.tokens_per_second:,.0f} tokens/s"
    )
    if fastest.rows != largest.rows:
        print0(f"fastest    --training.device_batch_size {fastest.rows}: {fastest.tokens_per_second:,.0f} tokens/s")


def search(attempt: Callable[[int], Try], max_batch_size: int) -> list[Try]:
    """Try 1, 2, 4, ... rows up to ``max_batch_size``; after the first that does not fit, halve the interval in between."""
    tries = [attempt(1)]
    while tries[-1].fits and tries[-1].rows < max_batch_size:
        tries.append(attempt(min(2 * tries[-1].rows, max_batch_size)))
    if tries[-1].fits:
        return tries
    low, high = max((one.rows for one in tries if one.fits), default=0), tries[-1].rows
    while high - low > 1:
        tries.append(attempt((low + high) // 2))
        low, high = (tries[-1].rows, high) if tries[-1].fits else (low, tries[-1].rows)
    return tries


def in_a_process(function: Callable[..., Try], settings: FindBatchSizeSettings, rows: int, limit: int) -> Try:
    """``function(settings, rows, limit)`` in a fresh process; one that a signal ended did not fit.

    Raises:
        RuntimeError: it failed for another reason than memory; its traceback is on the error stream.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, function, settings, rows, limit), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
    if process.exitcode is not None and process.exitcode < 0:
        return Try(rows, fits=False, why_not=f"out of memory: the process was ended by signal {-process.exitcode}")
    raise RuntimeError(f"trying {rows} rows failed, see the traceback above")


def _report(channel: Connection, function: Callable[..., Try], *arguments: Any) -> None:
    channel.send(function(*arguments))


def try_batch(settings: FindBatchSizeSettings, rows: int, limit: int) -> Try:
    """Forward, backward and optimizer step, once to warm up and then timed, with gradients kept as in accumulation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, _ = planned_config(settings)
    context = planned_context(settings, config)
    try:
        _hold_to(limit, device)
        model = build_model(config, settings.seed).to(device).train()
        enable_activation_checkpointing(model, settings.training)
        if settings.training.precision == "fp8":
            use_float8(model)
        optimizer = build_optimizer(model, settings.training)
        ids = torch.randint(config.vocab_size, (rows, context), device=device)
        mixed = autocast(device, precision(settings, device))
        seconds = []
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            with mixed:
                loss = model(input_ids=ids, labels=ids, shift_labels=ids).loss
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Try(rows, fits=False, why_not="out of memory", peak_bytes=peak_memory(device))
    peak = peak_memory(device)
    if peak > limit:
        return Try(rows, fits=False, why_not=f"out of memory: it took {peak / GB:.2f} GB", peak_bytes=peak)
    return Try(rows, True, "", rows * context / statistics.median(seconds[1:]), peak)


def precision(settings: PretrainSettings, device: str) -> str:
    """What `pretrain` would take, without the measurement that auto stands for: bf16 where the device can."""
    if settings.training.precision != "auto":
        return settings.training.precision
    return "bf16" if has_bf16(torch.device(device)) else "fp32"


def _limit(settings: FindBatchSizeSettings) -> int:
    if settings.max_memory is not None:
        return parse_bytes(settings.max_memory, "max-memory")
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _hold_to(limit: int, device: str) -> None:
    """Let what goes beyond ``limit`` bytes fail, before this process takes it from the others on the machine."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    elif sys.platform == "linux":
        import resource

        used = psutil.Process().memory_info()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = used.data + max(limit - used.rss, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard < 0 else min(soft, hard), hard))


def peak_memory(device: str) -> int:
    """Bytes at the highest point of this process's life."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's number is not this program's own: it outlives exec
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ advice
