"""What a person sees: summary lines that stay, and a progress bar that goes."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


def say(text: str = "") -> None:
    """One line, on the main process of a launch only, shown as it is (brackets are no markup)."""
    import os

    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False)


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator["ProgressLine"]:
    """A bar with the time left, on a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ProgressLine(progress, progress.add_task(description, total=total, completed=done, status=""))


class ProgressLine:
    def __init__(self, progress: Progress, task: TaskID):
        self.progress, self.task = progress, task

    def update(self, completed: int, status: str = "") -> None:
        self.progress.update(self.task, completed=completed, status=status)


def duration(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
