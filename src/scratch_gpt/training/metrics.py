"""metrics.jsonl: one JSON object per logged step, exact across interruptions."""

import json
from pathlib import Path
from typing import Any

from scratch_gpt.files import write_text


class MetricsFile:
    """Appends records; at the start of a resumed run, drops those of steps that will be done again."""

    def __init__(self, path: Path, keep_through: int, write: bool = True):
        self.path, self.writes = path, write
        records = [record for record in read_metrics(path) if record["step"] <= keep_through]
        if write:
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self.last_step: int = records[-1]["step"] if records else 0

    def write(self, record: dict[str, Any]) -> None:
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.last_step = record["step"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
