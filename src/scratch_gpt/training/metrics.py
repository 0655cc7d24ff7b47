"""metrics.jsonl: one JSON object per logged step, exact across interruptions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scratch_gpt.files import disk_errors, flush, write_text


class MetricsFile:
    """Appends records of steps, and of events between them (such as a skipped step).

    ``written`` is told of each, where this process ``write``s. At the start of a resumed run, drops what will be done again: steps after ``step``, and events from ``row`` on.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        row: int,
        write: bool = True,
        written: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        self.path, self.writes, self.written = path, write, written
        self._keep(lambda record: record["row"] <= row if "event" in record else record["step"] <= step)

    def roll_back(self, step: int) -> None:
        """Drop the steps after ``step``; events stay."""
        self._keep(lambda record: "event" in record or record["step"] <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        records = [record for record in _read(self.path) if wanted(record)]
        if self.writes:
            with disk_errors(f"{self.path} (the checkpoints are untouched)"):
                write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.last_step: int = max((record["step"] for record in records if "event" not in record), default=0)

    def write(self, record: dict[str, Any]) -> None:
        if self.writes:
            with (
                disk_errors(f"{self.path} (the checkpoints are untouched)"),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(record) + "\n")
            self.written(record)
        if "event" not in record:
            self.last_step = record["step"]

    def flush(self) -> None:
        """Ask the operating system to put what was written on disk."""
        if self.writes:
            flush(self.path)


def speed(record: dict[str, Any]) -> str:
    """Of a step, for the console."""
    mfu = "" if record.get("mfu") is None else f"  MFU {record['mfu']:.0%}"
    return f"{record['tokens_per_second']:,.0f} tokens/s{mfu}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of all steps; a last line that a crash cut short is left out."""
    return [record for record in _read(path) if "event" not in record]


def read_events(path: Path) -> list[dict[str, Any]]:
    """What happened between the steps: skipped ones, rollbacks."""
    return [record for record in _read(path) if "event" in record]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
