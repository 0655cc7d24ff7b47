"""From the run's cursor to the batches of its next step, read in the background while the step before is computed."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np

from scratch_gpt.data.batches import Batch, read_rows
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.shards import TokenStream
from scratch_gpt.errors import UserError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class StepData:
    """What one process computes in one optimizer step."""

    batches: list[Batch]
    """This process's rows, a forward pass at a time."""
    num_targets: int
    """Target tokens of the step, over all processes."""
    cursor: DataPosition
    """Where the run stands after the step."""


class TrainingData:
    """The training split of a folder of shards, in the order of a run."""

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
        self, cursor: DataPosition, rows_per_step: int, micro_batches: int, process: int = 0, processes: int = 1
    ) -> StepData:
        """The next ``rows_per_step`` rows; process p takes every ``processes``-th of them, from the p-th on.

        Raises:
            UserError: a token id that the model's vocabulary does not have.
        """
        places = [self.order.locate(cursor, row) for row in range(cursor.row, cursor.row + rows_per_step)]
        rows = [(source, self.order.packings[source].row(index)) for source, index in places]
        mine = rows[process::processes]
        size = len(mine) // micro_batches
        batches = []
        for first in range(0, len(mine), size):
            chosen = mine[first : first + size]
            batch = read_rows([(self.streams[s], row) for s, row in chosen], self.context_length, self.document_mask)
            self._check_vocabulary(batch, [source for source, _ in chosen])
            batches.append(batch)
        num_targets = sum(count for _, row in rows for _, count in row)
        return StepData(batches, num_targets, dataclasses.replace(cursor, row=cursor.row + rows_per_step))

    def _check_vocabulary(self, batch: Batch, sources: list[str]) -> None:
        # in numpy: torch would start a second set of OpenMP threads for this one
        highest_ids = np.maximum(batch.input_ids.numpy().max(1), batch.targets.numpy().max(1))
        for source, highest in zip(sources, highest_ids.tolist(), strict=True):
            if highest >= self.vocab_size:
                raise UserError(
                    f"the shards of {source} hold the token id {highest}, but the model's vocabulary ends at "
                    f"{self.vocab_size - 1}: they belong to another tokenizer; prepare the data again"
                )


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, at most ``ahead`` items ahead of its reader; order and exceptions are unchanged.

    As a context manager it stops the thread at the end of its block, however that ends.
    """

    def __init__(self, items: Iterator[Item], ahead: int = 2):
        self._items = items
        self._done: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> "Prefetcher[Item]":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing = True
        self._room.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closing:
                    return
                self._done.put((next(self._items), None))
        except BaseException as error:  # noqa: BLE001 (not handled here: the reader gets it in its turn, the end too)
            self._done.put((None, error))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._done.get()
        if error is not None:
            self._done.put((None, error))  # whoever asks again gets it again
            raise error
        self._room.release()
        return item  # type: ignore[return-value]
