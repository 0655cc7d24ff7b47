"""The watch over the processes of a run, with a store and no processes; with processes: `distributed/test_failures.py`."""

import threading

import pytest
import torch.distributed as dist

from scratch_gpt.distributed.watchdog import Watchdog


@pytest.fixture
def store(monkeypatch):
    """A store of the launch, which process 0 has."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return server


def what_ends(watchdog):
    """Why ``watch``, whose main thread does not get on, would end its process."""
    told, reasons = threading.Event(), []

    def end(why):
        reasons.append(why)
        told.set()
        watchdog._ended.set()

    watchdog._end = end
    with watchdog:
        assert told.wait(20)
    return reasons[0]


def test_a_process_that_has_not_come_is_named(store):
    assert what_ends(Watchdog(0.2, 1, 2)) == "process 0 has not begun to train"


def test_where_all_live_they_say_where_they_are(store):
    with Watchdog(60, 0, 2) as other:
        other.interval = 0.05
        other.heartbeat("reading the rows of step 3")
        other._beat()
        watchdog = Watchdog(0.2, 1, 2)
        signs = watchdog._signs
        watchdog._signs = lambda: (other._beat(), signs())[1]
        watchdog.heartbeat("in step 3")
        why = what_ends(watchdog)
    assert why.startswith("process 0 (") and "is reading the rows of step 3; process 1 (" in why
    assert why.endswith("is in step 3")


def test_a_store_that_is_gone_is_missed_by_those_who_are_not_leaving(store):
    class Gone:
        def set(self, key, value):
            raise dist.DistNetworkError("connection reset")

    for leaving, ends in (
        (False, ["process 0 on 127.0.0.1, which has the store of the launch, does not answer"]),
        (True, []),
    ):
        watchdog, reasons = Watchdog(0.2, 1, 2), []
        watchdog._store, watchdog._end = Gone(), reasons.append
        if leaving:
            watchdog.stop()
        watchdog._beat_on()
        assert [reason.partition(" (")[0] for reason in reasons] == ends


def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_it_is_told(store):
    answer = threading.Event()

    class Silent:
        def check(self, keys):
            return answer.wait()

        def multi_get(self, keys):
            return [b"{}"] * len(keys)

    watchdog = Watchdog(0.2, 1, 2)
    watchdog._store = Silent()
    assert watchdog._missing() == "process 0 on 127.0.0.1, which has the store of the launch, does not answer"
    answer.set()
