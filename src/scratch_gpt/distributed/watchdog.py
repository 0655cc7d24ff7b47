"""Watch the ranks of a run, and name the one that hangs.

A rank that waits for another in a collective waits until torch's timeout, which does not say for whom. So each rank has one
thread that writes a heartbeat, with what the main thread is doing, into the store of the launch, and one that watches the
clock. If the main thread makes no progress for too long, the latter finds out which ranks are silent, or what each is
doing, prints it and aborts its own process; the launcher then ends or restarts the run. If the store itself does not
respond, the process that hosts it is the one that hangs.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

EXIT_HUNG = 1
MAX_INTERVAL = 15.0
"""Longest time between two heartbeats, in seconds."""


class Watchdog:
    """A context in which this process aborts if there is no :meth:`heartbeat` for ``timeout`` seconds.

    Does nothing in runs of one process. ``abort`` receives the reason, from a thread of the watchdog. Default: print it and
    end the process.
    """

    def __init__(self, timeout: float, rank: int, world_size: int, abort: Callable[[str], None] | None = None):
        self.timeout, self.rank, self.world_size = timeout, rank, world_size
        self.interval = min(timeout / 4, MAX_INTERVAL)
        self._abort = abort or self._end_process
        self._done = threading.Event()
        jobs = {"heartbeat": self._send_heartbeats, "watchdog": self._watch_clock}
        self._threads = [threading.Thread(target=job, name=name, daemon=True) for name, job in jobs.items()]
        self._num_sent, self._stopping = 0, False
        self.heartbeat("at the beginning")

    def heartbeat(self, activity: str) -> None:
        """Report that the main thread makes progress, and what it does now, as in "in step 3"."""
        self._activity, self._since = activity, time.monotonic()

    def stop(self) -> None:
        """Announce the end of the run: from now on other ranks may be gone, and the store with them."""
        self._stopping = True
        self.heartbeat("leaving the other processes")

    def __enter__(self) -> Self:
        if self.world_size > 1:
            # A connection of its own, because the main thread may block torch's; new keys after each restart.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self.interval),
            )
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"scratch_gpt/watch/{restarts}", store)
            self._send_heartbeat()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self.interval)

    def _send_heartbeats(self) -> None:
        try:
            while not self._done.wait(self.interval):
                self._send_heartbeat()
        except dist.DistError as error:
            if not self._stopping and not self._done.is_set():
                self._abort(f"{_store_silent()} ({error})")

    def _watch_clock(self) -> None:
        while not self._done.wait(self.interval):
            if time.monotonic() - self._since > self.timeout:
                reason = self._find_hung_ranks()
                if not self._done.is_set():
                    self._abort(reason)

    def _send_heartbeat(self) -> None:
        self._num_sent += 1
        heartbeat = {
            "count": self._num_sent,
            "activity": self._activity,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._store.set(str(self.rank), json.dumps(heartbeat))

    def _find_hung_ranks(self) -> str:
        """Name the ranks that send no heartbeats; if all do, say what each is doing."""
        if (before := self._read_heartbeats()) is None:
            return _store_silent()
        self._done.wait(3 * self.interval)
        if (after := self._read_heartbeats()) is None:
            return _store_silent()
        silent = []
        for rank, (earlier, latest) in enumerate(zip(before, after, strict=True)):
            if latest is None:
                silent.append(f"process {rank} has not begun to train")
            elif earlier is not None and latest["count"] == earlier["count"]:
                silent.append(f"{_process(rank, latest)} does not respond, last seen {latest['activity']}")
        active = [f"{_process(rank, latest)} is {latest['activity']}" for rank, latest in enumerate(after) if latest]
        return "; ".join(silent or active)

    def _read_heartbeats(self) -> list[dict[str, Any] | None] | None:
        """Return the latest heartbeat of each rank, None for one that has sent none; None if the store does not respond."""
        heartbeats: list[dict[str, Any] | None] = []

        def read() -> None:
            keys = [str(rank) for rank in range(self.world_size)]
            present = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
            found = dict(zip(present, map(json.loads, self._store.multi_get(present)), strict=True))
            heartbeats.extend(found.get(key) for key in keys)

        # torch's store has no timeout for a server that is up and does not answer
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(2 * self.interval)
        return heartbeats or None

    def _end_process(self, reason: str) -> None:
        print(f"scratch-gpt: process {self.rank} aborts {self._activity}: {reason}", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)


def _process(rank: int, heartbeat: dict[str, Any]) -> str:
    return f"process {rank} ({heartbeat['pid']} on {heartbeat['host']})"


def _store_silent() -> str:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = "the launcher" if shared else "process 0"
    return f"{host} on {os.environ['MASTER_ADDR']}, which hosts the store of the launch, does not respond"
