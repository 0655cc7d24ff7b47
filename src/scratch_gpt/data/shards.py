"""Token shards on disk, and circular token streams over them.

A folder of shards holds, for each source of text and each split, files ``{source}/{split}-00000.bin`` (little-endian
token ids, uint16 or uint32) with ``{source}/{split}-00000.docs`` (uint64: where each document begins in that file), and
``manifest.json``, written last. Each document is its tokens and one end-of-text token. The manifest::

    {"format": "scratch_gpt.tokens/2", "tokenizer": fingerprint, "vocab_size": 50257, "dtype": "<u2", "end_of_text": 0,
     "sources": {NAME: {"source": its origin, "text": fingerprint of the text and its options, "held_out": a sentence,
                        "removed": {"duplicates": 0, "contaminated": 0, "broken": 0, "empty": 0},
                        "splits": {"train": {"tokens": 0, "documents": 0, "bytes": 0, "shards": [
                                       {"name": "NAME/train-00000", "tokens": 0, "documents": 0, "bytes": 0,
                                        "sha256": {"bin": ..., "docs": ...}}]},
                                   "validation": {...}}}}}
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scratch_gpt.errors import UserError
from scratch_gpt.files import new_folder, sha256, write_json

MANIFEST = "manifest.json"
WORK = ".prepare"
"""Folder that exists while shards are being prepared."""
FORMAT = "scratch_gpt.tokens/2"
COUNTS = ("tokens", "documents", "bytes")
REMOVED = ("duplicates", "contaminated", "broken", "empty")
TOKENS_PER_SHARD = 500_000_000


def token_dtype(vocab_size: int) -> str:
    """Return the smallest dtype for the token ids: "<u2" (uint16) or "<u4" (uint32), little-endian."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def totals(manifest: dict[str, Any], split: str) -> dict[str, int]:
    """Return the number of tokens, documents and bytes of a split, summed over all sources."""
    splits = [entry["splits"][split] for entry in manifest["sources"].values()]
    return {key: sum(one[key] for one in splits) for key in COUNTS}


class ShardWriter:
    """Appends documents to shards of bounded size; a shard gets its final name only when it is complete.

    ``folder / name`` is the first shard, ``name-1`` the second and so on; ``temporary`` is a folder on the same disk
    for unfinished shards.
    """

    def __init__(
        self, folder: Path, name: str, temporary: Path, *, dtype: str, end_of_text: int, tokens_per_shard: int
    ):
        self.folder, self.name, self.temporary = folder, name, temporary
        self.itemsize, self.tokens_per_shard = np.dtype(dtype).itemsize, tokens_per_shard
        self.end_of_text = np.asarray([end_of_text], dtype=dtype).tobytes()
        self.shards: list[dict[str, Any]] = []
        self.files: dict[str, _HashedFile] = {}

    def add(self, ids: bytes, num_bytes: int) -> None:
        """Append one document: its token ids as bytes, without end-of-text, and its length in UTF-8 bytes."""
        if not self.files:
            name = self.name if not self.shards else f"{self.name}-{len(self.shards)}"
            self.shards.append({"name": name, "tokens": 0, "documents": 0, "bytes": 0})
            self.files = {suffix: _HashedFile(self._partial(suffix)) for suffix in ("bin", "docs")}
        shard = self.shards[-1]
        self.files["docs"].write(shard["tokens"].to_bytes(8, "little"))
        self.files["bin"].write(ids)
        self.files["bin"].write(self.end_of_text)
        shard["tokens"] += len(ids) // self.itemsize + 1
        shard["documents"] += 1
        shard["bytes"] += num_bytes
        if shard["tokens"] >= self.tokens_per_shard:
            self.finish()

    def finish(self) -> list[dict[str, Any]]:
        """Complete the last shard and return the manifest entries of all shards."""
        if self.files:
            shard = self.shards[-1]
            shard["sha256"] = {suffix: file.close() for suffix, file in self.files.items()}
            for suffix in self.files:
                self._partial(suffix).replace(self.folder / f"{shard['name']}.{suffix}")
            self.files = {}
        return self.shards

    def abandon(self) -> None:
        """Remove the unfinished shard."""
        for suffix, file in self.files.items():
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                file.file.close()
            self._partial(suffix).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return self.temporary / f"{self.shards[-1]['name'].replace('/', '.')}.{os.getpid()}.{suffix}"


class _HashedFile:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=2**20)
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)

    def close(self) -> str:
        """Flush to disk (fsync), close, and return the SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.hash.hexdigest()


def write_shards(
    folder: Path,
    splits: dict[str, Iterable[tuple[Sequence[int] | np.ndarray, int]]],
    *,
    source: str,
    vocab_size: int,
    end_of_text: int,
    tokenizer: str,
    description: dict[str, Any],
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> dict[str, Any]:
    """Write tokenized documents, given as (token ids, UTF-8 bytes), and return the manifest.

    The folder gets its name when it is complete, so an interrupted call leaves nothing behind.
    """
    dtype = token_dtype(vocab_size)
    entry: dict[str, Any] = {**description, "removed": dict.fromkeys(REMOVED, 0), "splits": {}}
    manifest = {"format": FORMAT, "tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": dtype}
    manifest |= {"end_of_text": end_of_text, "sources": {source: entry}}
    with new_folder(folder) as temporary:
        (temporary / source).mkdir()
        for split, documents in splits.items():
            writer = ShardWriter(
                temporary,
                f"{source}/{split}-00000",
                temporary,
                dtype=dtype,
                end_of_text=end_of_text,
                tokens_per_shard=tokens_per_shard,
            )
            for ids, num_bytes in documents:
                writer.add(np.asarray(ids, dtype=dtype).tobytes(), num_bytes)
            entry["splits"][split] = split_entry(writer.finish(), split, source)
        write_json(temporary / MANIFEST, manifest)
    return manifest


def split_entry(shards: list[dict[str, Any]], split: str, source: str) -> dict[str, Any]:
    """Return the manifest entry of a split.

    Raises:
        UserError: the split is empty.
    """
    if not shards:
        raise UserError(f"{source}: no text is left for the {split} split: provide more text or a validation text")
    return {key: sum(shard[key] for shard in shards) for key in COUNTS} | {"shards": shards}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest, and check that every shard file is present and has the right size.

    Raises:
        UserError: the folder holds no shards, or a file is missing or truncated.
    """
    path = folder / MANIFEST
    if not path.is_file() and (folder / WORK).is_dir():
        raise UserError(f"{folder} is not finished: resume it with the same `scratch-gpt data prepare` command")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MANIFEST}: make token shards with `scratch-gpt data prepare --output {folder}`"
        )
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}, expected {FORMAT!r}: prepare the data again")
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for file, shard in _shard_files(folder, manifest):
        expected = shard["tokens"] * itemsize if file.suffix == ".bin" else shard["documents"] * 8
        actual = file.stat().st_size if file.is_file() else 0
        if actual != expected:
            raise UserError(
                f"{file} has {actual:,} bytes, but the manifest records {expected:,}: prepare the data again"
            )
    return manifest


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Return a SHA-256 of all shards, by which a run recognizes its data."""
    checksums = [
        shard["sha256"]["bin"]
        for entry in manifest["sources"].values()
        for split in entry["splits"].values()
        for shard in split["shards"]
    ]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def verify_checksums(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with its checksum.

    Raises:
        UserError: a file is damaged; names the first one.
    """
    for file, shard in _shard_files(folder, manifest):
        if sha256(file) != shard["sha256"][file.suffix[1:]]:
            raise UserError(
                f"{file} is damaged: its checksum differs from the one in the manifest; prepare the data again"
            )


def _shard_files(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for entry in manifest["sources"].values():
        for split in entry["splits"].values():
            for shard in split["shards"]:
                for suffix in ("bin", "docs"):
                    yield folder / f"{shard['name']}.{suffix}", shard


class TokenStream:
    """The tokens of one split as a circular stream: the first token follows the last.

    Every document ends with end-of-text, so each document, the first included, is preceded by one.
    """

    def __init__(self, arrays: Sequence[np.ndarray], num_bytes: int, documents: Sequence[np.ndarray] | None = None):
        """``documents``: for each array, the offsets at which documents begin. Default: one document per array."""
        self.arrays, self.num_bytes = arrays, num_bytes
        self.starts = np.cumsum([0] + [len(array) for array in arrays])
        self._documents = [np.zeros(1, dtype=np.int64) for _ in arrays] if documents is None else documents

    @classmethod
    def open(cls, folder: Path, split: str, manifest: dict[str, Any], source: str | None = None) -> "TokenStream":
        """Memory-map one split of ``source``. Default: of all sources, one after the other."""
        entries = manifest["sources"].values() if source is None else [manifest["sources"][source]]
        splits = [entry["splits"][split] for entry in entries]
        names = [shard["name"] for one in splits for shard in one["shards"]]
        arrays = [np.memmap(folder / f"{name}.bin", dtype=manifest["dtype"], mode="r") for name in names]
        documents = [np.memmap(folder / f"{name}.docs", dtype="<u8", mode="r") for name in names]
        return cls(arrays, sum(one["bytes"] for one in splits), documents)

    @classmethod
    def of_documents(cls, documents: Iterable[tuple[list[int], int]], end_of_text: int) -> "TokenStream":
        """Build an in-memory stream of documents, given as (token ids, UTF-8 bytes)."""
        encoded = list(documents)
        tokens = [token for ids, _ in encoded for token in (*ids, end_of_text)]
        starts = np.cumsum([0] + [len(ids) + 1 for ids, _ in encoded])[:-1]
        return cls([np.asarray(tokens)], sum(num_bytes for _, num_bytes in encoded), [starts])

    def document_starts(self) -> np.ndarray:
        """Return the position of each document's first token, ascending: (documents,) int64. Cached."""
        return self._document_starts

    @cached_property
    def _document_starts(self) -> np.ndarray:
        pairs = zip(self._documents, self.starts[:-1], strict=True)
        return np.concatenate([offsets.astype(np.int64) + start for offsets, start in pairs])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Return ``length`` tokens from position ``start``, (length,) int64, wrapping around in both directions."""
        chunks = []
        position = start % len(self)
        while length > 0:
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            offset = position - int(self.starts[shard])
            chunk = self.arrays[shard][offset : offset + length]
            chunks.append(chunk.astype(np.int64))
            length -= len(chunk)
            position = (position + len(chunk)) % len(self)
        return np.concatenate(chunks)
