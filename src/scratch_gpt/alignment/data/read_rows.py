"""Read the rows of a .jsonl, .json or .parquet file, of a folder that `datasets` saved, or of a dataset on the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import DatasetDict, load_dataset, load_from_disk

from scratch_gpt.alignment.data import demo
from scratch_gpt.data.inputs import damaged_arrow
from scratch_gpt.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".parquet")


def read_rows(name: str, split: str) -> list[Row]:
    """Return all rows of the file, folder or Hub dataset ``name``, or of the demonstration data (`bundled`).

    Raises:
        UserError: it does not exist, or a line of it is malformed; the message says where.
    """
    if name == demo.NAME:
        return demo.demo_rows()
    path = Path(name)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_saved_dataset(name, split)
    if path.suffix in SUFFIXES or name.count("/") != 1:
        raise UserError(f"there is no file {name}: give .jsonl, .json or .parquet, or the name of a dataset on the Hub")
    try:
        return load_dataset(name, split=split).to_list()
    except Exception as error:  # errors of the Hub have no common class
        raise UserError(f"there is no file {name}, and it cannot be loaded from the Hub: {error}") from error


def _read_saved_dataset(folder: str, split: str) -> list[Row]:
    try:
        loaded = load_from_disk(folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a folder that `datasets` saved: give one of its files") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise UserError(f"{folder} has no split {split!r}, but {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded.to_list()


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        with damaged_arrow(path):
            return pq.read_table(path).to_pylist()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 at byte {error.start} of the file") from error
    if path.suffix != ".json":
        return list(_parse_lines(path, text))
    try:
        rows = json.loads(text)
    except ValueError:  # a .json file may hold JSON Lines
        return list(_parse_lines(path, text))
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number}: a {type(row).__name__}, not an object")
    return rows


def _parse_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a {type(row).__name__}, not an object")
        yield row
