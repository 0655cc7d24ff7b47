"""A guard that calls some steps bad whatever they are, in runs with `--guard.sigmas 99`: the same in every process."""

from scratch_gpt.training.spike_guard import SpikeGuard

SPOILT = ["--guard.sigmas", "99", "--guard.max_skips", "2"]
BAD = (4, 9, 10)
"""By the number of tries: one that is skipped, two that lead back to a checkpoint."""


def problem(guard, loss, grad_norm, original=SpikeGuard.problem):
    if guard.settings.sigmas != 99:
        return original(guard, loss, grad_norm)
    guard.tries = getattr(guard, "tries", 0) + 1
    if guard.tries in BAD:
        guard.skipped += 1
        return "it is spoilt"
    return original(guard, loss, grad_norm)
