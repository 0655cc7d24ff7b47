"""The order in which rows are drawn: a function of the seed and the step alone."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


@dataclasses.dataclass
class ResumableBatchSampler(Sampler[list[int]]):
    """The micro-batches of one process for a whole run. RepeatingSampler over the rows follow each other, each in an order of its own;
    a step takes the next so many rows, at the end of a pass some of this one and some of the next.
    """

    rows: int
    device_batch_size: int
    micro_batches: int
    """Of a step."""
    steps: int
    process: int
    processes: int
    seed: int

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for _ in range(len(self)):
            together = list(itertools.islice(order, self.device_batch_size * self.processes))
            yield together[self.process * self.device_batch_size :][: self.device_batch_size]

    def _order(self) -> Iterator[int]:
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.rows, generator=generator).tolist()


class RepeatingSampler(Sampler[int]):
    """What TRL's sampler gives in one pass over the prompts, pass after pass for a whole run of ``rows``.

    That sampler draws the order of each pass from one generator, which a resumed run would begin anew; here the number of the
    pass and the seed decide it.

    Raises:
        ValueError: there are fewer prompts than one batch takes.
    """

    def __init__(self, one_pass: Any, rows: int, seed: int):
        if not len(one_pass):
            raise ValueError(
                f"{one_pass.num_samples} prompts are fewer than the {one_pass.batch_size} of one batch: give more of them, or a "
                "smaller batch_size"
            )
        self.one_pass, self.rows, self.seed = one_pass, rows, seed

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(itertools.chain.from_iterable(map(self._ordered, itertools.count())), self.rows)

    def _ordered(self, number: int) -> Iterator[int]:
        self.one_pass.generator.manual_seed(self.seed + 1_000_003 * number)
        yield from self.one_pass
