"""A watch over the processes of a run, by which one that hangs is named.

What waits for a process that does not come waits until torch's time-out, which does not say for whom. So each process has a
thread that writes into the store of the launch that it lives, and where its main thread is; and one that looks at the
clock. Where the main thread has been in one place for too long, this tells which processes are silent or elsewhere and ends
its own: then the launcher ends or restarts the run. Where the store itself does not answer, it is who has it that hangs.
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


class Watchdog:
    """While active, ends this process where its main thread makes no :meth:`step` for ``timeout`` seconds.

    For runs of one process it does nothing.
    """

    def __init__(self, timeout: float, rank: int, world: int):
        self.timeout, self.rank, self.world_size = timeout, rank, world
        self.interval = min(timeout / 4, LONGEST_INTERVAL)
        self._ended = threading.Event()
        targets = {"sign of life": self._beat_on, "watch": self._look_on}
        self._threads = [threading.Thread(target=job, name=name, daemon=True) for name, job in targets.items()]
        self._beats, self._leaving = 0, False
        self.heartbeat("at the beginning")

    def heartbeat(self, place: str) -> None:
        """The main thread gets on: it is at ``place`` now."""
        self._place, self._since = place, time.monotonic()

    def stop(self) -> None:
        """The main thread says good-bye: from now on the others may be gone, and the store with them."""
        self._leaving = True
        self.heartbeat("leaving the other processes")

    def __enter__(self) -> Self:
        if self.world_size > 1:
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
            if not self._leaving:
                self._end(f"{_no_answer()} ({error})")

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
            return _no_answer()
        self._ended.wait(3 * self.interval)
        if (after := self._signs()) is None:
            return _no_answer()
        said = []
        for rank, (one, sign) in enumerate(zip(before, after, strict=True)):
            if sign is None:
                said.append(f"process {rank} has not begun to train")
            elif one is not None and sign["beats"] == one["beats"]:
                said.append(f"{_who(rank, sign)} gives no sign of life, last heard of {sign['at']}")
        return "; ".join(said or [f"{_who(rank, sign)} is {sign['at']}" for rank, sign in enumerate(after) if sign])

    def _signs(self) -> list[dict[str, Any] | None] | None:
        """What each process wrote last, None for one that has not yet; None where the store does not say."""
        signs: list[dict[str, Any] | None] = []

        def ask() -> None:
            keys = [str(rank) for rank in range(self.world_size)]
            there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
            found = dict(zip(there, map(json.loads, self._store.multi_get(there)), strict=True))
            signs.extend(found.get(key) for key in keys)

        # torch's store has no time-out for a server that is there and does not answer
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * self.interval)
        return signs or None

    def _end(self, why: str) -> None:
        if self._ended.is_set():
            return
        print(f"scratch-gpt: process {self.rank} gives up {self._place}: {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)


def _who(rank: int, sign: dict[str, Any]) -> str:
    return f"process {rank} ({sign['pid']} on {sign['host']})"


def _no_answer() -> str:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    whose = "the launcher" if shared else "process 0"
    return f"{whose} on {os.environ['MASTER_ADDR']}, which has the store of the launch, does not answer"
