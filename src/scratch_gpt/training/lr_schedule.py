"""Schedules of the learning rate and of the batch size: pure functions of the step, so that resuming needs no state."""

import math

from scratch_gpt.config import TrainingSettings


def learning_rate(step: int, max_steps: int, settings: TrainingSettings) -> float:
    """The rate for optimizer step ``step`` (from 0) of ``max_steps``: linear warm-up, then

    - wsd: constant, then linear to the end over the last ``decay_fraction`` of the run (Hu et al., 2024,
      arXiv:2404.06395; the linear decay of Hägele et al., 2024, arXiv:2405.18392);
    - cosine: half a cosine (Loshchilov and Hutter, 2017, arXiv:1608.03983);
    - linear: a straight line;
    - constant.

    The end is ``min_lr_ratio`` times the peak; by default a tenth for cosine and zero for wsd and linear.
    """
    warmup = min(settings.warmup_steps, max_steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    floor = settings.min_lr_ratio
    if floor is None:
        floor = 0.1 if settings.schedule == "cosine" else 0.0
    left = 1.0  # of the way from the floor to the peak
    if settings.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(max_steps - warmup, 1)))
    elif settings.schedule == "linear":
        left = (max_steps - step) / (max_steps - warmup)
    elif settings.schedule == "wsd":
        left = min(1.0, (max_steps - step) / (max(round(settings.decay_fraction * max_steps), 1) + 1))
    return settings.learning_rate * (floor + (1 - floor) * left)


def batch_size_at(step: int, full: int, smallest: int, settings: TrainingSettings) -> int:
    """Rows of optimizer step ``step``: with ``batch_warmup_steps`` they grow linearly to ``full``, in multiples of
    ``smallest`` (what one micro-batch on every process takes). A small batch early saves tokens that a large one would
    waste on a gradient that is far from noisy (McCandlish et al., 2018, arXiv:1812.06162).
    """
    if step >= settings.batch_warmup_steps:
        return full
    grown = full * (step + 1) / (settings.batch_warmup_steps + 1)
    return min(full, max(1, round(grown / smallest)) * smallest)
