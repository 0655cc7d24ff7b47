"""The watchdog with a real store and no other processes. With processes: `test_failures.py`."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from scratch_gpt.distributed.watchdog import Watchdog

STORE_SILENT = "process 0 on 127.0.0.1, which hosts the store of the launch, does not respond"


@pytest.fixture
def store(monkeypatch):
    """A store of the launch, hosted by process 0."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return server


class Aborts:
    """The reasons for which a watchdog would have ended its process."""

    def __init__(self):
        self.reasons, self.called = [], threading.Event()

    def __call__(self, reason):
        self.reasons.append(reason)
        self.called.set()

    def wait(self):
        assert self.called.wait(20)
        return self.reasons[0]


def test_a_rank_that_never_started_is_named(store):
    aborts = Aborts()
    with Watchdog(0.2, 1, 2, aborts):
        assert aborts.wait() == "process 0 has not begun to train"


def test_if_all_ranks_respond_each_says_what_it_does(store):
    aborts = Aborts()
    other = Watchdog(60, 0, 2)
    other.interval = 0.02
    other.heartbeat("reading the batch of step 3")
    with other, Watchdog(0.4, 1, 2, aborts) as watchdog:
        watchdog.heartbeat("in step 3")
        reason = aborts.wait()
    assert reason.startswith("process 0 (") and "is reading the batch of step 3; process 1 (" in reason
    assert reason.endswith(f"on {socket.gethostname()}) is in step 3")


def test_progress_prevents_the_abort(store):
    aborts = Aborts()
    with Watchdog(1.0, 1, 2, aborts) as watchdog:
        for step in range(15):
            watchdog.heartbeat(f"in step {step}")
            time.sleep(0.1)
    assert not aborts.reasons


@pytest.mark.parametrize("stopping", [False, True])
def test_a_lost_store_aborts_a_rank_unless_it_is_stopping(store, stopping, monkeypatch):
    lost = threading.Event()

    def set_lost(self, key, value, original=dist.PrefixStore.set):
        if lost.is_set():
            raise dist.DistNetworkError("connection reset")
        return original(self, key, value)

    monkeypatch.setattr(dist.PrefixStore, "set", set_lost)
    aborts = Aborts()
    watchdog = Watchdog(60, 1, 2, aborts)
    watchdog.interval = 0.05
    with watchdog:
        if stopping:
            watchdog.stop()
        lost.set()
        if not stopping:
            aborts.wait()
        time.sleep(0.3)
    assert [reason.partition(" (")[0] for reason in aborts.reasons] == ([] if stopping else [STORE_SILENT])


def test_a_store_that_does_not_respond_is_not_waited_for_longer_than_the_timeout(store, monkeypatch):
    respond = threading.Event()
    monkeypatch.setattr(dist.PrefixStore, "check", lambda self, keys: respond.wait())
    monkeypatch.setattr(dist.PrefixStore, "multi_get", lambda self, keys: [b"{}"] * len(keys))
    aborts = Aborts()
    with Watchdog(0.2, 1, 2, aborts):
        assert aborts.wait() == STORE_SILENT
        respond.set()
