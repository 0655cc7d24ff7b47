"""Records to documents: what a text, JSON Lines, Parquet or Arrow file or a dataset holds, one document at a time.

A text file's documents end at a line that holds only ``<|endoftext|>``, and at the end of the file.
"""

import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scratch_gpt.data.inputs import (
    DOCUMENT_SEPARATOR,
    Dataset,
    FileSlice,
    count_lines,
    damaged_arrow,
    kind_of,
    load_dataset,
    open_bytes,
)
from scratch_gpt.errors import UserError

Errors = Literal["strict", "replace"]
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class ReadOptions:
    """How a record becomes text, and what to do with one that is broken."""

    column: str = "text"
    template: str | None = None
    errors: Errors = "strict"
    on_bad_record: Literal["stop", "skip"] | None = None
    """None: an error, where there is no such choice."""

    @property
    def columns(self) -> list[str]:
        """The columns that the text is made of."""
        if self.template is None:
            return [self.column]
        return list(dict.fromkeys(_template_fields(self.template)))


class BrokenRecord(str):
    """What is wrong with a record, and where."""


# ------------------------------------------------------------------------------------------------ reading


def read_piece(piece: FileSlice, reading: ReadOptions, removed: Counter[str]) -> Iterator[str]:
    """The documents of ``piece`` in order. Counts in ``removed`` what is left out: "empty" records, "broken" ones.

    Raises:
        UserError: a broken record that is not to be skipped, a missing column, a file that is not what its name says.
    """
    for record in _records(piece, reading):
        if isinstance(record, BrokenRecord):
            if reading.on_bad_record == "stop":
                raise UserError(f"{record} --on-bad-record skip leaves out such records and counts them.")
            if reading.on_bad_record is None:
                raise UserError(record)
            removed["broken"] += 1
        elif not record or record.isspace():
            removed["empty"] += 1
        else:
            yield record


def _records(piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    if isinstance(piece.place, Dataset):
        return _read_dataset(piece.place, piece, reading)
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow}
    return readers[kind_of(piece.place)](piece.place, piece, reading)


def _read_text(path: Path, piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    separator = DOCUMENT_SEPARATOR.encode()
    lines: list[bytes] = []
    begin = position = piece.start

    def document() -> Iterator[str]:
        if lines:
            raw = b"".join(lines)
            lines.clear()  # a document may be large, and is held here until the next one is asked for
            text = _decode(raw, reading, lambda byte: f"{path}: not UTF-8 at byte {begin + byte}")
            del raw
            text = text if isinstance(text, BrokenRecord) else _checked(text.rstrip("\n"), reading, lambda: str(path))
            if text and not text.isspace():  # blank lines between two separators are layout, not a document
                yield text

    with open_bytes(path) as file:
        file.seek(piece.start)
        for line in file:
            position += len(line)
            if separator in line and line.strip() == separator:
                yield from document()
                begin = position
                if piece.end is not None and position >= piece.end:
                    return
            else:
                lines.append(line)
    yield from document()


def _read_jsonl(path: Path, piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    position = piece.start
    lines = 0

    def where() -> str:
        return f"{path}, line {count_lines(path, piece.start) + lines}"

    with open_bytes(path) as file:
        file.seek(piece.start)
        for raw in file:
            lines += 1
            position += len(raw)
            if raw.strip():
                yield _read_json(raw, reading, where)
            if piece.end is not None and position >= piece.end:
                return


def _read_json(raw: bytes, reading: ReadOptions, where: Callable[[], str]) -> str:
    record = _parse_json(raw, reading, where)
    return record if isinstance(record, BrokenRecord) else _text_of(record, reading, where)


def _parse_json(raw: bytes, reading: ReadOptions, where: Callable[[], str]) -> dict[str, Any] | BrokenRecord:
    text = _decode(raw, reading, lambda byte: f"{where()}: not UTF-8 at byte {byte} of the line")
    if isinstance(text, BrokenRecord):
        return text
    try:
        record = json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        return BrokenRecord(f"{where()}: not JSON: {error}.")
    if not isinstance(record, dict):
        return BrokenRecord(f"{where()}: a JSON object is needed, not {text.strip()[:40]!r}.")
    return record


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON Lines file.

    Raises:
        UserError: a line that is not a JSON object.
    """
    with open_bytes(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                record = _parse_json(raw, ReadOptions(), lambda number=number: f"{path}, line {number}")  # type: ignore[misc]
                if isinstance(record, BrokenRecord):
                    raise UserError(record)
                yield record


def _read_parquet(path: Path, piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damaged_arrow(path), pq.ParquetFile(path) as file:
        _require_columns(str(path), file.schema_arrow.names, reading)
        groups = range(piece.start, file.num_row_groups if piece.end is None else piece.end)
        batches = file.iter_batches(ROWS_PER_BATCH, row_groups=list(groups), columns=reading.columns)
        before = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        yield from _read_batches((pa.Table.from_batches([batch]) for batch in batches), str(path), before, reading)


def _read_arrow(path: Path, piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    import pyarrow as pa

    def batches(source: Any) -> Iterator[Any]:
        try:
            reader = pa.ipc.open_stream(source)
            schema, whole = reader.schema, iter(reader)
        except pa.ArrowInvalid:  # the other of Arrow's two file formats
            reader = pa.ipc.open_file(source)
            schema, whole = reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        _require_columns(str(path), schema.names, reading)
        for batch in whole:
            table = pa.Table.from_batches([batch]).select(reading.columns)
            yield from (table.slice(first, ROWS_PER_BATCH) for first in range(0, len(table), ROWS_PER_BATCH))

    with damaged_arrow(path), pa.memory_map(str(path)) as source:
        yield from _read_batches(batches(source), str(path), 0, reading)


def _read_dataset(place: Dataset, piece: FileSlice, reading: ReadOptions) -> Iterator[str]:
    dataset = load_dataset(place)
    if dataset.column_names is not None:
        _require_columns(place.path, dataset.column_names, reading)
        dataset = dataset.select_columns(reading.columns)
    if place.streaming:
        dataset = dataset.shard(dataset.num_shards, piece.start)
    else:
        dataset = dataset.select(range(piece.start, len(dataset) if piece.end is None else piece.end))
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    yield from _read_batches(tables, place.path, piece.start, reading)


def _read_batches(tables: Iterable[Any], place: str, before: int, reading: ReadOptions) -> Iterator[str]:
    row = before
    for table in tables:
        _require_columns(place, table.column_names, reading)
        try:
            records = table.to_pylist()
        except UnicodeDecodeError:  # Arrow takes any bytes for a string: find the row
            records = [_row_or_broken(table, index, f"{place}, row {row + index + 1}") for index in range(len(table))]
        for record in records:
            row += 1
            if isinstance(record, BrokenRecord):
                yield record
            else:
                yield _text_of(record, reading, lambda row=row: f"{place}, row {row}")  # type: ignore[misc]


def _row_or_broken(table: Any, index: int, where: str) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BrokenRecord(f"{where}: not UTF-8 at byte {error.start}.")


# ------------------------------------------------------------------------------------------------ a record's text


def _text_of(record: dict[str, Any], reading: ReadOptions, where: Callable[[], str]) -> str:
    missing = [column for column in reading.columns if column not in record]
    if missing:
        return BrokenRecord(f"{where()}: {_no_column(missing[0], list(record))}")
    if reading.template is None:
        text = record[reading.column]
        if text is None:
            return ""
        if not isinstance(text, str):
            kind = type(text).__name__
            return BrokenRecord(
                f"{where()}: the column {reading.column!r} holds {kind}, not text; a template makes it text."
            )
    else:
        known = {column: "" if record[column] is None else record[column] for column in reading.columns}
        try:
            text = reading.template.format_map(known)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            return BrokenRecord(f"{where()}: the template {reading.template!r} does not fit: {error!r}.")
    return _checked(text, reading, where)


def _checked(text: str, reading: ReadOptions, where: Callable[[], str]) -> str:
    """Refuse or replace what no text file holds: NUL bytes, and halves of surrogate pairs (JSON can write them)."""
    if "\0" in text:
        if reading.errors == "strict":
            found = text.index("\0")
            return BrokenRecord(
                f"{where()}: a NUL byte after {text[max(0, found - 20) : found]!r}; is it text, and UTF-8? "
                "--encoding-errors replace puts U+FFFD in its place."
            )
        text = text.replace("\0", "\ufffd")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if reading.errors == "strict":
                code = f"U+{ord(text[error.start]):04X}"
                return BrokenRecord(
                    f"{where()}: {code} is half a character; --encoding-errors replace puts U+FFFD in its place."
                )
            text = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def _decode(raw: bytes, reading: ReadOptions, where: Callable[[int], str]) -> str:
    try:
        return raw.decode("utf-8", reading.errors)
    except UnicodeDecodeError as error:
        return BrokenRecord(
            f"{where(error.start)} (0x{raw[error.start]:02x}). Convert the file, or go on with --encoding-errors replace."
        )


def check_template(template: str) -> None:
    """Raises a UserError for a template that names no column, or is malformed."""
    try:
        names = _template_fields(template)
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from error
    if not names or "" in names:
        raise UserError(f"the template {template!r} must name columns, for example '{{title}}: {{text}}'")


def _template_fields(template: str) -> list[str]:
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return [name.split(".")[0].split("[")[0] for name in fields]


def _require_columns(place: str, names: list[str], reading: ReadOptions) -> None:
    for column in reading.columns:
        if column not in names:
            raise UserError(f"{place}: {_no_column(column, names)}")


def _no_column(column: str, names: list[str]) -> str:
    return f"there is no column {column!r}; the columns are {', '.join(map(str, names)) or 'none'} (--column chooses)."
