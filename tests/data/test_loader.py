import threading
import time

import pytest

from scratch_gpt.data.loader import Prefetcher


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


def test_items_come_in_order_and_are_read_before_they_are_asked_for():
    begun = []

    def items():
        for number in range(50):
            begun.append(number)
            yield number

    with Prefetcher(items(), ahead=3) as reader:
        deadline = time.monotonic() + 10
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == [0, 1, 2]  # so far and no farther
        assert list(reader) == list(range(50))
    assert readers() == []


def test_an_exception_in_the_thread_reaches_the_reader_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(items()) as reader:
        assert next(reader) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(reader)
    assert readers() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_thread_ends_with_the_block_however_that_ends(error):
    def endless():
        while True:
            yield bytes(10)

    with pytest.raises(error), Prefetcher(endless()) as reader:
        next(reader)
        raise error
    assert readers() == []
