"""Records to documents: read text, JSON Lines, Parquet and Arrow files and datasets, one document at a time.

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
    """Options for turning records into text, and for handling broken ones."""

    column: str = "text"
    template: str | None = None
    errors: Errors = "strict"
    on_bad_record: Literal["stop", "skip"] | None = None
    """Default: stop, for commands without --on-bad-record."""

    @property
    def columns(self) -> list[str]:
        """Columns that the text is composed of."""
        if self.template is None:
            return [self.column]
        return list(dict.fromkeys(_template_fields(self.template)))


class BrokenRecord(str):
    """Description of a broken record: what is wrong, and where."""


# ------------------------------------------------------------------------------------------------ reading


def read_slice(file_slice: FileSlice, read_options: ReadOptions, removed: Counter[str]) -> Iterator[str]:
    """Yield the documents of ``file_slice`` in order; count "empty" and "broken" records in ``removed`` and skip them.

    Raises:
        UserError: a broken record when ``on_bad_record`` is not "skip", a missing column, a file of another format than
            its name indicates.
    """
    for record in _records(file_slice, read_options):
        if isinstance(record, BrokenRecord):
            if read_options.on_bad_record == "stop":
                raise UserError(f"{record} Use --on-bad-record skip to skip and count such records.")
            if read_options.on_bad_record is None:
                raise UserError(record)
            removed["broken"] += 1
        elif not record or record.isspace():
            removed["empty"] += 1
        else:
            yield record


def _records(file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    if isinstance(file_slice.location, Dataset):
        return _read_dataset(file_slice.location, file_slice, read_options)
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow}
    return readers[kind_of(file_slice.location)](file_slice.location, file_slice, read_options)


def _read_text(path: Path, file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    separator = DOCUMENT_SEPARATOR.encode()
    lines: list[bytes] = []
    begin = position = file_slice.start

    def document() -> Iterator[str]:
        if lines:
            raw = b"".join(lines)
            lines.clear()  # frees a possibly large document before yielding
            text = _decode(raw, read_options, lambda byte: f"{path}: not UTF-8 at byte {begin + byte}")
            del raw
            text = (
                text if isinstance(text, BrokenRecord) else _checked(text.rstrip("\n"), read_options, lambda: str(path))
            )
            if text and not text.isspace():  # blank lines between two separators are layout, not a document
                yield text

    with open_bytes(path) as file:
        file.seek(file_slice.start)
        for line in file:
            position += len(line)
            if separator in line and line.strip() == separator:
                yield from document()
                begin = position
                if file_slice.end is not None and position >= file_slice.end:
                    return
            else:
                lines.append(line)
    yield from document()


def _read_jsonl(path: Path, file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    position = file_slice.start
    lines = 0

    def where() -> str:
        return f"{path}, line {count_lines(path, file_slice.start) + lines}"

    with open_bytes(path) as file:
        file.seek(file_slice.start)
        for raw in file:
            lines += 1
            position += len(raw)
            if raw.strip():
                yield _read_json(raw, read_options, where)
            if file_slice.end is not None and position >= file_slice.end:
                return


def _read_json(raw: bytes, read_options: ReadOptions, where: Callable[[], str]) -> str:
    record = _parse_json(raw, read_options, where)
    return record if isinstance(record, BrokenRecord) else _text_of(record, read_options, where)


def _parse_json(raw: bytes, read_options: ReadOptions, where: Callable[[], str]) -> dict[str, Any] | BrokenRecord:
    text = _decode(raw, read_options, lambda byte: f"{where()}: not UTF-8 at byte {byte} of the line")
    if isinstance(text, BrokenRecord):
        return text
    try:
        record = json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        return BrokenRecord(f"{where()}: not JSON: {error}.")
    if not isinstance(record, dict):
        return BrokenRecord(f"{where()}: expected a JSON object, not {text.strip()[:40]!r}.")
    return record


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON Lines file.

    Raises:
        UserError: a line that is not a JSON object.
    """
    with open_bytes(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                where = f"{path}, line {number}"
                record = _parse_json(raw, ReadOptions(), lambda where=where: where)  # type: ignore[misc]
                if isinstance(record, BrokenRecord):
                    raise UserError(record)
                yield record


def _read_parquet(path: Path, file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damaged_arrow(path), pq.ParquetFile(path) as file:
        _require_columns(str(path), file.schema_arrow.names, read_options)
        groups = range(file_slice.start, file.num_row_groups if file_slice.end is None else file_slice.end)
        batches = file.iter_batches(ROWS_PER_BATCH, row_groups=list(groups), columns=read_options.columns)
        before = sum(file.metadata.row_group(group).num_rows for group in range(file_slice.start))
        yield from _read_batches((pa.Table.from_batches([batch]) for batch in batches), str(path), before, read_options)


def _read_arrow(path: Path, file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    import pyarrow as pa

    def batches(source: Any) -> Iterator[Any]:
        try:
            reader = pa.ipc.open_stream(source)
            schema, record_batches = reader.schema, iter(reader)
        except pa.ArrowInvalid:  # not the stream format: the file format
            reader = pa.ipc.open_file(source)
            schema = reader.schema
            record_batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        _require_columns(str(path), schema.names, read_options)
        for batch in record_batches:
            table = pa.Table.from_batches([batch]).select(read_options.columns)
            yield from (table.slice(first, ROWS_PER_BATCH) for first in range(0, len(table), ROWS_PER_BATCH))

    with damaged_arrow(path), pa.memory_map(str(path)) as source:
        yield from _read_batches(batches(source), str(path), 0, read_options)


def _read_dataset(location: Dataset, file_slice: FileSlice, read_options: ReadOptions) -> Iterator[str]:
    dataset = load_dataset(location)
    if dataset.column_names is not None:
        _require_columns(location.path, dataset.column_names, read_options)
        dataset = dataset.select_columns(read_options.columns)
    if location.streaming:
        dataset = dataset.shard(dataset.num_shards, file_slice.start)
    else:
        dataset = dataset.select(range(file_slice.start, len(dataset) if file_slice.end is None else file_slice.end))
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    yield from _read_batches(tables, location.path, file_slice.start, read_options)


def _read_batches(tables: Iterable[Any], location: str, before: int, read_options: ReadOptions) -> Iterator[str]:
    row = before
    for table in tables:
        _require_columns(location, table.column_names, read_options)
        try:
            records = table.to_pylist()
        except UnicodeDecodeError:  # Arrow strings may hold any bytes: find the row
            records = [
                _row_or_broken(table, index, f"{location}, row {row + index + 1}") for index in range(len(table))
            ]
        for record in records:
            row += 1
            if isinstance(record, BrokenRecord):
                yield record
            else:
                yield _text_of(record, read_options, lambda row=row: f"{location}, row {row}")  # type: ignore[misc]


def _row_or_broken(table: Any, index: int, where: str) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BrokenRecord(f"{where}: not UTF-8 at byte {error.start}.")


# ------------------------------------------------------------------------------------------------ a record's text


def _text_of(record: dict[str, Any], read_options: ReadOptions, where: Callable[[], str]) -> str:
    missing = [column for column in read_options.columns if column not in record]
    if missing:
        return BrokenRecord(f"{where()}: {_no_column(missing[0], list(record))}")
    if read_options.template is None:
        text = record[read_options.column]
        if text is None:
            return ""
        if not isinstance(text, str):
            kind = type(text).__name__
            return BrokenRecord(
                f"{where()}: the column {read_options.column!r} holds {kind}, not text; use a template to convert it."
            )
    else:
        known = {column: "" if record[column] is None else record[column] for column in read_options.columns}
        try:
            text = read_options.template.format_map(known)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            return BrokenRecord(f"{where()}: the template {read_options.template!r} does not fit: {error!r}.")
    return _checked(text, read_options, where)


def _checked(text: str, read_options: ReadOptions, where: Callable[[], str]) -> str:
    """Refuse or replace NUL bytes and unpaired surrogates (JSON can contain them)."""
    if "\0" in text:
        if read_options.errors == "strict":
            found = text.index("\0")
            return BrokenRecord(
                f"{where()}: a NUL byte after {text[max(0, found - 20) : found]!r}; is it text, and UTF-8? "
                "Use --encoding-errors replace to replace it with U+FFFD."
            )
        text = text.replace("\0", "\ufffd")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if read_options.errors == "strict":
                code = f"U+{ord(text[error.start]):04X}"
                return BrokenRecord(
                    f"{where()}: {code} is an unpaired surrogate. "
                    "Use --encoding-errors replace to replace it with U+FFFD."
                )
            text = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def _decode(raw: bytes, read_options: ReadOptions, where: Callable[[int], str]) -> str:
    try:
        return raw.decode("utf-8", read_options.errors)
    except UnicodeDecodeError as error:
        return BrokenRecord(
            f"{where(error.start)} (0x{raw[error.start]:02x}). Convert the file, or use --encoding-errors replace."
        )


def check_template(template: str) -> None:
    """Check a template.

    Raises:
        UserError: it is malformed or names no column.
    """
    try:
        names = _template_fields(template)
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from error
    if not names or "" in names:
        raise UserError(f"the template {template!r} must name columns, for example '{{title}}: {{text}}'")


def _template_fields(template: str) -> list[str]:
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return [name.split(".")[0].split("[")[0] for name in fields]


def _require_columns(location: str, names: list[str], read_options: ReadOptions) -> None:
    for column in read_options.columns:
        if column not in names:
            raise UserError(f"{location}: {_no_column(column, names)}")


def _no_column(column: str, names: list[str]) -> str:
    return f"there is no column {column!r}; the columns are {', '.join(map(str, names)) or 'none'} (set --column)."
