"""What to say when a run is out of memory."""

import re

import torch

from scratch_gpt.config import PretrainSettings


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device's or the machine's memory at its end."""
    signs = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def out_of_memory_advice(error: BaseException, settings: PretrainSettings) -> str:
    """The text of a UserError for an error that `is_out_of_memory`: what ran out, and what to change, mildest first."""
    training = settings.training
    rows = training.device_batch_size
    step = training.total_batch_size // training.context_length if training.context_length else None
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), flags=re.IGNORECASE)
    what = f"out of memory (it asked for {asked.group(1)} more)" if asked else "out of memory"
    return f"{what}: {_mend(rows, step, training.context_length)}"


def _mend(rows: int | None, step: int | None, context: int | None) -> str:
    """``rows`` of a forward pass, None for all ``step`` rows of an optimizer step (None: unknown)."""
    present = rows if rows is not None else step
    ways = []
    if present is None:
        ways.append("give --training.device_batch_size fewer rows than the whole step that it is now; the losses stay")
    elif present > 1:
        smaller = max(n for n in range(1, present // 2 + 1) if present % n == 0)
        now = f"now {present}" if rows is not None else f"now the whole step, {present} rows"
        ways.append(f"take --training.device_batch_size {smaller} ({now}; the losses stay the same, in more passes)")
    ways.append("recompute activations with --training.activation_checkpointing full (about a fifth slower)")
    shorter = f"{context // 2} (now {context})" if context and context > 1 else "smaller than the model's longest"
    ways.append(f"shorten --training.context_length to {shorter}; the model then learns from shorter texts")
    text = "first " + "; then ".join(ways)
    return f"{text}. `scratch-gpt find-batch-size` measures what fits, `scratch-gpt plan` says what takes how much."
