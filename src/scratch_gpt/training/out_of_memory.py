"""Recognize out-of-memory errors, and advise on how to avoid them."""

import re

import torch

from scratch_gpt.config import PretrainSettings

CPU_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in CPU_MESSAGES)
    )


def out_of_memory_advice(error: BaseException, settings: PretrainSettings) -> str:
    """The message for an error that `is_out_of_memory`: how much was requested, and what to change, mildest first."""
    training = settings.training
    context_length = training.context_length
    sequences_per_step = training.total_batch_size // context_length if context_length else None
    requested = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), flags=re.IGNORECASE)
    what = f"out of memory (it requested {requested.group(1)} more)" if requested else "out of memory"
    return f"{what}: {memory_advice(training.device_batch_size, sequences_per_step, context_length)}"


def memory_advice(device_batch_size: int | None, sequences_per_step: int | None, context_length: int | None) -> str:
    """List changes that reduce memory, mildest first.

    Args:
        device_batch_size: sequences per forward pass; None: all ``sequences_per_step``.
        sequences_per_step: sequences per optimizer step; None: unknown.
        context_length: tokens per sequence; None: the model's longest.
    """
    current = device_batch_size if device_batch_size is not None else sequences_per_step
    ways = []
    if current is None:
        ways.append(
            "set --training.device_batch_size to fewer sequences than the full step, which is one forward pass now; "
            "the losses stay the same"
        )
    elif current > 1:
        smaller = max(n for n in range(1, current // 2 + 1) if current % n == 0)
        now = f"now {current}" if device_batch_size is not None else f"now the full step, {current} sequences"
        ways.append(
            f"set --training.device_batch_size {smaller} ({now}; the losses stay the same, in more forward passes)"
        )
    ways.append("recompute activations with --training.activation_checkpointing full (about a fifth slower)")
    shorter = f"{context_length // 2} (now {context_length})" if context_length and context_length > 1 else None
    ways.append(
        f"reduce --training.context_length to {shorter or 'less than the longest that the model takes'}; the model then "
        "trains on shorter sequences"
    )
    return (
        f"first {'; then '.join(ways)}. `scratch-gpt find-batch-size` measures what fits, `scratch-gpt plan` lists what "
        "takes how much memory."
    )
