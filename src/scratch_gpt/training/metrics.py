"""metrics.jsonl: one JSON object per logged step or event, exact across interruptions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scratch_gpt.files import disk_errors, flush, write_text


class MetricsFile:
    """Appends records of steps, and of events between them (such as a skipped step).

    Opening the file of a resumed run drops the records of what will be repeated: steps after ``step``, and events after
    data row ``row``.

    Args:
        write: whether this process writes; the others only keep count.
        on_write: called with each record that is written.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        row: int,
        write: bool = True,
        on_write: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        self.path, self.writes, self.on_write = path, write, on_write
        self.last_step: int
        """Step of the last record."""
        self._keep(lambda record: record["row"] <= row if "event" in record else record["step"] <= step)

    def roll_back(self, step: int) -> None:
        """Drop the records of steps after ``step``; keep all events."""
        self._keep(lambda record: "event" in record or record["step"] <= step)

    def write(self, record: dict[str, Any]) -> None:
        if self.writes:
            with (
                disk_errors(f"{self.path} (the checkpoints are untouched)"),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(record) + "\n")
            self.on_write(record)
        if "event" not in record:
            self.last_step = record["step"]

    def flush(self) -> None:
        """Flush what was written to the disk."""
        if self.writes:
            flush(self.path)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        records = [record for record in _read(self.path) if wanted(record)]
        if self.writes:
            with disk_errors(f"{self.path} (the checkpoints are untouched)"):
                write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.last_step = max((record["step"] for record in records if "event" not in record), default=0)


def format_speed(record: dict[str, Any]) -> str:
    """Tokens per second and MFU of a step's record, for the console."""
    mfu = "" if record.get("mfu") is None else f"  MFU {record['mfu']:.0%}"
    return f"{record['tokens_per_second']:,.0f} tokens/s{mfu}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of all steps, without a last line that a crash cut short."""
    return [record for record in _read(path) if "event" not in record]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of what happened between steps: skipped steps, rollbacks, benchmarks."""
    return [record for record in _read(path) if "event" in record]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
