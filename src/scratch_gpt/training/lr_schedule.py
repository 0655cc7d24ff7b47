"""Schedules of the learning rate and of the batch size: pure functions of the step, so that a resume needs no state."""

import math

from scratch_gpt.config import TrainingSettings


def learning_rate(step: int, max_steps: int, training: TrainingSettings) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``max_steps``: linear warm-up, then by ``schedule``

    - wsd: constant, then linear decay over the last ``decay_fraction`` of the run (Hu et al., 2024, arXiv:2404.06395;
      the linear decay of Hägele et al., 2024, arXiv:2405.18392);
    - cosine: half a cosine (Loshchilov and Hutter, 2017, arXiv:1608.03983);
    - linear: a straight line;
    - constant.

    The decay ends at ``min_lr_ratio`` times the peak. Default: 0.1 for cosine, 0 for wsd and linear.
    """
    warmup_steps = min(training.warmup_steps, max_steps // 2)
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / (warmup_steps + 1)
    min_ratio = training.min_lr_ratio
    if min_ratio is None:
        min_ratio = 0.1 if training.schedule == "cosine" else 0.0
    decay = 1.0  # from 1 at the peak to 0 at the end
    if training.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(max_steps - warmup_steps, 1)))
    elif training.schedule == "linear":
        decay = (max_steps - step) / (max_steps - warmup_steps)
    elif training.schedule == "wsd":
        decay = min(1.0, (max_steps - step) / (max(round(training.decay_fraction * max_steps), 1) + 1))
    return training.learning_rate * (min_ratio + (1 - min_ratio) * decay)


def batch_size_at(step: int, full_size: int, micro_batch_size: int, training: TrainingSettings) -> int:
    """Sequences in optimizer step ``step``, over all processes.

    During ``batch_warmup_steps`` the batch grows linearly to ``full_size``, in multiples of ``micro_batch_size`` (one
    micro-batch on every process). A large batch would waste tokens early in training, when the gradient is far from
    noisy (McCandlish et al., 2018, arXiv:1812.06162).
    """
    if step >= training.batch_warmup_steps:
        return full_size
    target = full_size * (step + 1) / (training.batch_warmup_steps + 1)
    return min(full_size, max(1, round(target / micro_batch_size)) * micro_batch_size)
