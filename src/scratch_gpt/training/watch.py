"""A watch over the processes of a run, by which one that hangs is named.

What waits for a process that does not come waits until torch's time-out, which does not say for whom. So each process has a
thread that writes into the store of the launch that it lives, and where its main thread is. Where that has been for too
long, the thread tells which processes are silent or elsewhere and ends its own: then the launcher ends or restarts the run.
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


class Watch:
    """While active, ends this process where its main thread makes no :meth:`step` for ``timeout`` seconds.

    For runs of one process it does nothing.
    """

    def __init__(self, timeout: float, rank: int, world: int):
        self.timeout, self.rank, self.world = timeout, rank, world
        self.interval = min(timeout / 4, LONGEST_INTERVAL)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
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
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.wait(self.interval):
                self._beat()
                if time.monotonic() - self._since > self.timeout:
                    missing = self._missing()
                    if not self._ended.is_set():
                        self._end(missing)
        except dist.DistError as error:
            self._end(f"the store of the launch, in the launcher or in process 0, does not answer ({error})")

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beats": self._beats, "at": self._place, "pid": os.getpid(), "host": socket.gethostname()}
        self._store.set(str(self.rank), json.dumps(sign))

    def _missing(self) -> str:
        """Which processes give no sign of life; if all do, who is where."""
        before = self._signs()
        for _ in range(3):
            self._ended.wait(self.interval)
            self._beat()
        after = self._signs()
        silent = [sign for one, sign in zip(before, after, strict=True) if sign["beats"] == one["beats"]]
        said = [f"{sign['who']} gives no sign of life, last heard of {sign['at']}" for sign in silent]
        return "; ".join(said or [f"{sign['who']} is {sign['at']}" for sign in after])

    def _signs(self) -> list[dict[str, Any]]:
        keys = [str(rank) for rank in range(self.world)]
        self._store.wait(keys)  # `get` alone has no time-out where the store hangs
        signs = [json.loads(value) for value in self._store.multi_get(keys)]
        return [sign | {"who": f"process {k} ({sign['pid']} on {sign['host']})"} for k, sign in enumerate(signs)]

    def _end(self, why: str) -> None:
        print(f"scratch-gpt: process {self.rank} gives up {self._place}: {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)
