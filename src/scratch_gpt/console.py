"""What a person sees: summary lines that stay, and a progress bar that goes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
LINE_SECONDS = 60.0


def print0(text: str = "") -> None:
    """One line, on the main process of a launch only, shown as it is (brackets are no markup)."""
    if on_main_process():
        console.print(text, markup=False)


def on_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator["ProgressLine"]:
    """A bar with the time left; where no terminal shows it, a line every :data:`LINE_SECONDS`."""
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
    def __init__(self, progress: Progress, task: TaskID):
        self.progress, self.task = progress, task
        self.last_line = time.monotonic()

    def update(self, completed: int, status: str = "") -> None:
        self.progress.update(self.task, completed=completed, status=status)
        if self.progress.disable and time.monotonic() - self.last_line >= LINE_SECONDS:
            left = self.progress.tasks[self.task].time_remaining
            print0(f"  {status}" + ("" if left is None else f"  {format_duration(left)} left"))
            self.last_line = time.monotonic()


def printable(text: str) -> str:
    """On one line, with what no terminal can show replaced."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def format_duration(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
