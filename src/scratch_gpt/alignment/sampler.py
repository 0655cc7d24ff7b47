"""Data orders that a run can be resumed in: each is a function of the seed and the step, or epoch, alone.

| sampler | yields | used by |
|---|---|---|
| :class:`ResumableBatchSampler` | micro-batches of one rank, for the whole run | SFT, reward model, DPO |
| :class:`RepeatingSampler` | single samples in TRL's grouped order, for the whole run | GRPO, RLOO |
| :class:`RolloutSampler` | the prompts of one rank's rollouts, epoch by epoch | PPO |
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

SEED_STRIDE = 1_000_003
"""A prime that keeps the seeds of different epochs apart."""


@dataclasses.dataclass
class ResumableBatchSampler(Sampler[list[int]]):
    """Yield the micro-batches of one rank for a whole run.

    Epochs follow each other, each in another order. A step takes the next samples of that stream, at the end of an epoch some
    of this one and some of the next.
    """

    num_samples: int
    """Samples in the dataset."""
    device_batch_size: int
    """Samples in a micro-batch of one rank."""
    gradient_accumulation_steps: int
    max_steps: int
    dp_rank: int
    dp_size: int
    seed: int

    def __len__(self) -> int:
        return self.max_steps * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(len(self)):
            of_all_ranks = list(itertools.islice(stream, self.device_batch_size * self.dp_size))
            yield of_all_ranks[self.dp_rank * self.device_batch_size :][: self.device_batch_size]

    def _stream(self) -> Iterator[int]:
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + epoch)
            yield from torch.randperm(self.num_samples, generator=generator).tolist()


class RepeatingSampler(Sampler[int]):
    """Repeat TRL's sampler of one epoch until ``num_samples`` are yielded.

    TRL's sampler shuffles all epochs with one generator, which a resumed run would start from the beginning; here the seed and
    the epoch decide each order.

    Raises:
        ValueError: there are fewer prompts than one batch takes.
    """

    def __init__(self, one_epoch: Any, num_samples: int, seed: int):
        if not len(one_epoch):
            raise ValueError(
                f"{one_epoch.num_samples} prompts are fewer than the {one_epoch.batch_size} of one batch: add prompts, or "
                "lower batch_size"
            )
        self.one_epoch, self.num_samples, self.seed = one_epoch, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        epochs = map(self._epoch, itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), self.num_samples)

    def _epoch(self, epoch: int) -> Iterator[int]:
        self.one_epoch.generator.manual_seed(self.seed + SEED_STRIDE * epoch)
        yield from self.one_epoch


class RolloutSampler(Sampler[list[int]]):
    """Yield the prompts of each of one rank's rollouts, ``repeats`` times in a row: once per micro-batch of the rollout.

    The order of an epoch follows from its number and the seed. An epoch consists of full rollouts; prompts that do not fill
    one wait for another epoch. If there are fewer prompts than a rollout takes, some are used more than once.
    """

    def __init__(self, num_prompts: int, rollout_size: int, repeats: int, dp_rank: int, dp_size: int, seed: int):
        """``rollout_size``: the completions in a rollout of one rank."""
        self.num_prompts, self.rollout_size, self.repeats = num_prompts, rollout_size, repeats
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def num_rollouts(self) -> int:
        """Rollouts in an epoch."""
        return max(1, self.num_prompts // (self.rollout_size * self.dp_size))

    def __len__(self) -> int:
        return self.num_rollouts * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + self.epoch)
        global_size = self.rollout_size * self.dp_size
        order: list[int] = []
        while len(order) < global_size:
            order += torch.randperm(self.num_prompts, generator=generator).tolist()
        for rollout in range(self.num_rollouts):
            first = rollout * global_size + self.dp_rank * self.rollout_size
            for _ in range(self.repeats):
                yield order[first : first + self.rollout_size]
