"""Input files of several kinds, compressed or not, and datasets: open them and cut them into slices.

Several processes can each read a slice: a byte range of text or JSON Lines that begins and ends with a record, row
groups of Parquet, or rows of a dataset; a compressed or Arrow file is one slice. Slices depend on the files alone.
"""

import contextlib
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from scratch_gpt.errors import UserError

DOCUMENT_SEPARATOR = "<|endoftext|>"
COMPRESSIONS = (".gz", ".zst", ".xz")
KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}


@dataclass(frozen=True)
class Dataset:
    """A dataset that the `datasets` library reads: a name on the Hub, or a local folder."""

    path: str
    subset: str | None = None
    split: str = "train"
    streaming: bool = False


Location = Path | Dataset


@dataclass(frozen=True)
class FileSlice:
    """From ``start`` to before ``end`` (None: all): bytes, row groups, rows, or shards of a streamed dataset."""

    location: Location
    start: int = 0
    end: int | None = None


def kind_of(path: Path) -> str:
    """Return "text", "jsonl", "parquet" or "arrow", by the file's name; "text" if unknown."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1].lower(), "text") if suffixes else "text"


def is_compressed(path: Path) -> bool:
    return path.suffix in COMPRESSIONS


# ------------------------------------------------------------------------------------------------ opening


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for reading uncompressed bytes.

    Raises:
        UserError: a compressed file that is damaged or truncated.
    """
    try:
        with contextlib.ExitStack() as stack:
            if path.suffix == ".gz":
                yield cast(BinaryIO, stack.enter_context(gzip.open(path)))
            elif path.suffix == ".xz":
                yield cast(BinaryIO, stack.enter_context(lzma.open(path)))
            elif path.suffix == ".zst":
                import pyarrow as pa

                stream = stack.enter_context(pa.CompressedInputStream(str(path), "zstd"))
                yield cast(BinaryIO, stack.enter_context(_Unseekable(stream, buffer_size=2**20)))
            else:
                yield stack.enter_context(path.open("rb"))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error
    except OSError as error:
        if not is_compressed(path) or error.errno is not None:
            raise
        raise UserError(f"{path}: damaged or truncated: {error}") from error


class _Unseekable(io.BufferedReader):
    """Ignores seeks to the beginning: Arrow's decompressed streams cannot seek and are read from there anyway."""

    def seek(self, offset: int, whence: int = 0) -> int:
        assert (offset, whence) == (0, 0)
        return 0


@contextlib.contextmanager
def damaged_arrow(path: Path) -> Iterator[None]:
    """Turn an Arrow error into a :class:`UserError` that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: damaged, or not of the format that its name indicates: {error}") from error


@lru_cache(maxsize=4)
def load_dataset(location: Dataset) -> Any:
    """Load ``location`` once per process.

    Raises:
        UserError: the dataset, subset or split does not exist.
    """
    import datasets

    folder = Path(location.path).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if location.split not in saved:
                    raise UserError(f"{location.path} has no split {location.split!r}; it has {', '.join(saved)}")
                saved = saved[location.split]
            return saved.to_iterable_dataset(num_shards=8) if location.streaming else saved
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else location.path,
            location.subset,
            split=location.split,
            streaming=location.streaming,
        )
    except (OSError, ValueError) as error:  # not found, no such subset, no connection
        if isinstance(error, UserError):
            raise
        raise UserError(f"the dataset {location.path} cannot be loaded: {error}") from error


# ------------------------------------------------------------------------------------------------ slices


def cut(location: Location, size: int) -> Iterator[tuple[FileSlice, int]]:
    """Yield the slices of ``location``, each of about ``size`` bytes, with their actual sizes in bytes."""
    if isinstance(location, Dataset):
        yield from _cut_dataset(location, size)
        return
    kind, total = kind_of(location), location.stat().st_size
    if kind == "parquet":
        yield from _cut_parquet(location, size)
    elif kind == "arrow" or is_compressed(location):
        if kind in ("parquet", "arrow") and is_compressed(location):
            raise UserError(f"{location}: {kind} files cannot be read compressed: decompress it first")
        yield FileSlice(location), total
    else:
        starts = [0, *_record_starts(location, kind, size), total]
        for start, end in itertools.pairwise(starts):
            yield FileSlice(location, start, end), end - start


def _record_starts(path: Path, kind: str, size: int) -> Iterator[int]:
    """Yield byte offsets at which records begin in a text or JSON Lines file, about every ``size`` bytes."""
    separator = DOCUMENT_SEPARATOR.encode()
    total = path.stat().st_size
    position = 0
    with path.open("rb") as file:
        while position + size < total:
            file.seek(position + size)
            file.readline()  # to the end of the line
            if kind == "text":
                while (line := file.readline()) and line.strip() != separator:
                    pass
            position = file.tell()
            if position >= total:
                return
            yield position


def _cut_parquet(path: Path, size: int) -> Iterator[tuple[FileSlice, int]]:
    import pyarrow.parquet as pq

    with damaged_arrow(path):
        metadata = pq.read_metadata(path)
    start = weight = 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        if weight >= size or group + 1 == metadata.num_row_groups:
            yield FileSlice(path, start, group + 1), weight
            start, weight = group + 1, 0


def _cut_dataset(location: Dataset, size: int) -> Iterator[tuple[FileSlice, int]]:
    dataset = load_dataset(location)
    if location.streaming:
        for shard in range(dataset.num_shards):
            yield FileSlice(location, shard), size
        return
    rows, num_bytes = len(dataset), dataset.data.nbytes
    step = max(1, rows * size // max(num_bytes, 1))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield FileSlice(location, start, end), num_bytes * (end - start) // rows


def count_lines(path: Path, end: int) -> int:
    """Count the lines before byte ``end`` of an uncompressed file."""
    lines = 0
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(end, 2**20))):
            lines += block.count(b"\n")
            end -= len(block)
    return lines
