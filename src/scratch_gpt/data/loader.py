"""Read the batches of the next optimizer step in the background, from the run's position in its data."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np

from scratch_gpt.data.batches import Batch, read_sequences
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.errors import UserError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class StepData:
    """The data of one rank for one optimizer step."""

    batches: list[Batch]
    """This rank's sequences, one batch per micro-batch."""
    num_targets: int
    """Target tokens of the step, summed over all ranks."""
    cursor: DataPosition
    """Position in the data after the step."""


class TrainingData:
    """The training split of token shards, in the order of a run."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        order: DataOrder,
        context_length: int,
        document_mask: bool,
        vocab_size: int,
    ):
        self.streams, self.order, self.context_length = streams, order, context_length
        self.document_mask, self.vocab_size = document_mask, vocab_size

    def read_step(
        self, position: DataPosition, sequences_per_step: int, micro_batches: int, rank: int = 0, world_size: int = 1
    ) -> StepData:
        """Read every ``world_size``-th of the next ``sequences_per_step`` sequences, starting at ``rank``.

        Raises:
            UserError: a token id is outside the model's vocabulary.
        """
        indices = range(position.row, position.row + sequences_per_step)
        located = [self.order.locate(position, index) for index in indices]
        sequences = [(source, self.order.packings[source].sequence(index)) for source, index in located]
        own = sequences[rank::world_size]
        size = len(own) // micro_batches
        batches = []
        for first in range(0, len(own), size):
            chosen = own[first : first + size]
            batch = read_sequences(
                [(self.streams[source], sequence) for source, sequence in chosen],
                self.context_length,
                self.document_mask,
            )
            self._check_vocabulary(batch, [source for source, _ in chosen])
            batches.append(batch)
        num_targets = sum(count for _, sequence in sequences for _, count in sequence)
        return StepData(batches, num_targets, dataclasses.replace(position, row=position.row + sequences_per_step))

    def _check_vocabulary(self, batch: Batch, sources: list[str]) -> None:
        # numpy, because torch would start another pool of OpenMP threads in the prefetch thread
        highest_ids = np.maximum(batch.input_ids.numpy().max(1), batch.targets.numpy().max(1))
        for source, highest in zip(sources, highest_ids.tolist(), strict=True):
            if highest >= self.vocab_size:
                raise UserError(
                    f"the shards of {source} hold the token id {highest}, but the model's vocabulary ends at "
                    f"{self.vocab_size - 1}: they were made with a different tokenizer; prepare the data again"
                )


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, at most ``ahead`` items ahead of its consumer; order and exceptions are kept.

    Use it as a context manager: leaving the block stops the thread.
    """

    def __init__(self, items: Iterator[Item], ahead: int = 2):
        self._items = items
        self._done: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
        self._free_slots = threading.Semaphore(ahead)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)

    def __enter__(self) -> "Prefetcher[Item]":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing = True
        self._free_slots.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._free_slots.acquire()
                if self._closing:
                    return
                self._done.put((next(self._items), None))
        except BaseException as error:  # noqa: BLE001 (re-raised in the consumer, StopIteration included)
            self._done.put((None, error))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._done.get()
        if error is not None:
            self._done.put((None, error))  # a later call raises it again
            raise error
        self._free_slots.release()
        return item  # type: ignore[return-value]
