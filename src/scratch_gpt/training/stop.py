"""Stopping on request: Ctrl-C, SIGTERM and the end of the allotted time are noted, and the loop saves at the end of its step."""

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from scratch_gpt.errors import StoppedOnRequest


class StopRequest:
    """While active, turns SIGINT and SIGTERM into ``requested``; a second Ctrl-C interrupts at once.

    So does the end of ``max_hours`` from now on.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._signalled = False
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours is not None else math.inf

    @property
    def requested(self) -> bool:
        return self._signalled or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is StoppedOnRequest and dist.is_initialized():
            # The launcher sends SIGTERM when the first process has ended; the others are about to, with their own code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
