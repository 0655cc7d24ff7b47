"""Prefetching: order, limits, exceptions and the end of the thread."""

import threading
import time

import pytest

from scratch_gpt.data.loader import Prefetcher


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


def test_items_are_prefetched_in_order_up_to_the_limit():
    begun = []

    def items():
        for number in range(50):
            begun.append(number)
            yield number

    with Prefetcher(items(), ahead=3) as prefetcher:
        deadline = time.monotonic() + 10
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == [0, 1, 2]
        assert list(prefetcher) == list(range(50))
    assert prefetch_threads() == []


def test_an_exception_in_the_thread_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(items()) as prefetcher:
        assert next(prefetcher) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(prefetcher)
    assert prefetch_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_thread_ends_with_the_block_after_any_exception(error):
    def endless():
        while True:
            yield bytes(10)

    with pytest.raises(error), Prefetcher(endless()) as prefetcher:
        next(prefetcher)
        raise error
    assert prefetch_threads() == []
