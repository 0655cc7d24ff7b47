"""Console output: summary lines and a progress bar, printed by the main process only."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
LINE_SECONDS = 60.0
"""Interval between progress lines if the output is not a terminal."""


def print0(text: str = "") -> None:
    """Print a line on the main process only, without interpreting brackets as markup."""
    if on_main_process():
        console.print(text, markup=False)


def on_main_process() -> bool:
    """Return whether this process has rank 0, by the launcher's environment variable."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator["ProgressLine"]:
    """Show a progress bar with the remaining time; not on a terminal, print a line every :data:`LINE_SECONDS`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    hidden = not (console.is_terminal and on_main_process())
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield ProgressLine(progress, progress.add_task(description, total=total, completed=done, status=""))


class ProgressLine:
    """A progress bar, or lines at intervals if the bar is disabled."""

    def __init__(self, progress: Progress, task: TaskID):
        self.progress, self.task = progress, task
        self.last_line = time.monotonic()

    def update(self, completed: int, status: str = "") -> None:
        """Set the progress and the text that follows the bar."""
        self.progress.update(self.task, completed=completed, status=status)
        if self.progress.disable and time.monotonic() - self.last_line >= LINE_SECONDS:
            left = self.progress.tasks[self.task].time_remaining
            print0(f"  {status}" + ("" if left is None else f"  {format_duration(left)} left"))
            self.last_line = time.monotonic()


def printable(text: str) -> str:
    """Join ``text`` to one line and replace unprintable characters with U+FFFD."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def format_duration(seconds: float) -> str:
    """Format seconds as [h:]mm:ss: 75 -> 1:15, 4000 -> 1:06:40."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
