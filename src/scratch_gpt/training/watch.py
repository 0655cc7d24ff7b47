"""A watch over the processes of a run, by which one that hangs is named.

What waits for a process that does not come waits until torch's time-out, which does not say for whom. So each process has a
thread that writes into the store of the launch that it lives, and where its main thread is; and one that looks at the
clock. Where the main thread has been in one place for too long, this tells which processes are silent or elsewhere and ends
its own: then the launcher ends or restarts the run. It ends its own, too, where the store does not answer, for process 0,
which may have it, may be the one that hangs.
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

EXIT_LOST = 1
LONGEST_INTERVAL = 15.0
"""Seconds between two signs of life."""
NO_ANSWER = "the store of the launch, in the launcher or in process 0, does not answer"


class Watch:
    """While active, ends this process where its main thread makes no :meth:`step` for ``timeout`` seconds.

    For runs of one process it does nothing.
    """

    def __init__(self, timeout: float, rank: int, world: int):
        self.timeout, self.rank, self.world = timeout, rank, world
        self.interval = min(timeout / 4, LONGEST_INTERVAL)
        self._ended = threading.Event()
        targets = {"sign of life": self._beat_on, "watch": self._look_on}
        self._threads = [threading.Thread(target=job, name=name, daemon=True) for name, job in targets.items()]
        self._beats = 0
        self.at("at the beginning")

    def at(self, place: str) -> None:
        """The main thread gets on: it is at ``place`` now."""
        self._place, self._since = place, time.monotonic()

    def __enter__(self) -> Self:
        if self.world > 1:
            # A connection of its own, for the main thread may wait in torch's; new keys after each restart.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self.interval),
            )
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"scratch_gpt/watch/{restarts}", store)
            self._beat()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self.interval)

    def _beat_on(self) -> None:
        try:
            while not self._ended.wait(self.interval):
                self._beat()
        except dist.DistError as error:
            self._end(f"{NO_ANSWER} ({error})")

    def _look_on(self) -> None:
        while not self._ended.wait(self.interval):
            if time.monotonic() - self._since > self.timeout:
                self._end(self._missing())

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beats": self._beats, "at": self._place, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.set(str(self.rank), json.dumps(sign))

    def _missing(self) -> str:
        """Which processes give no sign of life; if all do, who is where."""
        if (before := self._signs()) is None:
            return NO_ANSWER
        self._ended.wait(3 * self.interval)
        if (after := self._signs()) is None:
            return NO_ANSWER
        silent = [sign for one, sign in zip(before, after, strict=True) if sign["beats"] == one["beats"]]
        said = [f"{sign['who']} gives no sign of life, last heard of {sign['at']}" for sign in silent]
        return "; ".join(said or [f"{sign['who']} is {sign['at']}" for sign in after])

    def _signs(self) -> list[dict[str, Any]] | None:
        """What each process wrote last, or None where the store does not say."""
        values: list[bytes] = []
        keys = [str(rank) for rank in range(self.world)]
        # torch's store has no time-out for a server that is there and does not answer
        asking = threading.Thread(target=lambda: values.extend(self._store.multi_get(keys)), daemon=True)
        asking.start()
        asking.join(2 * self.interval)
        if not values:
            return None
        signs = [json.loads(value) for value in values]
        return [sign | {"who": f"process {k} ({sign['pid']} on {sign['host']})"} for k, sign in enumerate(signs)]

    def _end(self, why: str) -> None:
        if self._ended.is_set():
            return
        print(f"scratch-gpt: process {self.rank} gives up {self._place}: {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)
