"""Stop a run cleanly: Ctrl-C, SIGTERM and the time limit are noted, and the trainer saves at the end of its step."""

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from scratch_gpt.errors import StoppedOnRequest


class StopRequest:
    """Within its block, SIGINT and SIGTERM set ``requested`` instead of ending the process.

    So does the end of ``max_hours``, counted from its creation. A second Ctrl-C interrupts at once.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._signaled = False
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours is not None else math.inf

    @property
    def requested(self) -> bool:
        return self._signaled or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is StoppedOnRequest and dist.is_initialized():
            # The launcher sends SIGTERM to the rest when the first rank has ended; each is about to end with its own code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signaled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signaled = True
