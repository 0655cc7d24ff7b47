"""Learning-rate schedules: pure functions of the step, so that resuming needs no scheduler state."""

import math

from scratch_gpt.config import TrainingSettings

COSINE_FLOOR = 0.1


def learning_rate(step: int, max_steps: int, settings: TrainingSettings) -> float:
    """The rate for optimizer step ``step`` (from 0) of ``max_steps``.

    wsd: linear warm-up, constant, linear decay to zero over the last ``decay_fraction`` of the run (Hu et al., 2024,
    arXiv:2404.06395; the linear decay of Hägele et al., 2024, arXiv:2405.18392). cosine: linear warm-up, then half a
    cosine to a tenth of the peak (Loshchilov and Hutter, 2017, arXiv:1608.03983).
    """
    warmup = min(settings.warmup_steps, max_steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(max_steps - warmup, 1)
        scale = COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(round(settings.decay_fraction * max_steps), 1)
        scale = min(1.0, (max_steps - step) / (decay_steps + 1))
    return settings.learning_rate * scale
