"""Stopping on request: Ctrl-C and SIGTERM are noted, and the loop saves at the end of its step."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """While active, turns SIGINT and SIGTERM into ``requested``; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
