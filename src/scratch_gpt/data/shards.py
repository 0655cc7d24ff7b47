"""Token shards on disk, and circular streams of tokens over them.

A folder of shards holds, for each source of text and each split, files ``{source}/{split}-00000.bin`` (little-endian
token ids, uint16 or uint32) with ``{source}/{split}-00000.docs`` (uint64: where each document begins in that file), and
``manifest.json``, written last. Each document is its tokens and one end-of-text token. The manifest::

    {"format": "scratch_gpt.tokens/2", "tokenizer": fingerprint, "vocab_size": 50257, "dtype": "<u2", "end_of_text": 0,
     "sources": {NAME: {"source": where from, "text": fingerprint of the text and of its options, "held_out": a sentence,
                        "removed": {"duplicates": 0, "contaminated": 0, "broken": 0, "empty": 0},
                        "splits": {"train": {"tokens": 0, "documents": 0, "bytes": 0, "shards": [
                                       {"name": "NAME/train-00000", "tokens": 0, "documents": 0, "bytes": 0,
                                        "sha256": {"bin": ..., "docs": ...}}]},
                                   "validation": {...}}}}}
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scratch_gpt.errors import UserError
from scratch_gpt.files import new_folder, sha256, write_json

MANIFEST = "manifest.json"
FORMAT = "scratch_gpt.tokens/2"
TOKENS_PER_SHARD = 50_000_000


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_shards(
    folder: Path,
    splits: dict[str, Iterable[tuple[list[int], int]]],
    *,
    source: str,
    vocab_size: int,
    end_of_text: int,
    tokenizer: str,
    description: dict[str, Any],
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> dict[str, Any]:
    """Write each split's documents, given as (token ids, UTF-8 bytes), and return the manifest.

    The whole folder appears under its name at once, so an interrupted call leaves nothing.
    """
    manifest: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer, "vocab_size": vocab_size}
    manifest |= {"dtype": token_dtype(vocab_size), "end_of_text": end_of_text}
    entry: dict[str, Any] = {**description, "removed": dict.fromkeys(REMOVED, 0), "splits": {}}
    manifest["sources"] = {source: entry}
    with new_folder(folder) as temporary:
        (temporary / source).mkdir()
        for split, documents in splits.items():
            shards: list[dict[str, Any]] = []
            for number, (tokens, offsets, shard_bytes) in enumerate(_group(documents, end_of_text, tokens_per_shard)):
                name = f"{source}/{split}-{number:05d}"
                np.asarray(tokens, dtype=manifest["dtype"]).tofile(temporary / f"{name}.bin")
                np.asarray(offsets, dtype="<u8").tofile(temporary / f"{name}.docs")
                shards.append(
                    {
                        "name": name,
                        "tokens": len(tokens),
                        "documents": len(offsets),
                        "bytes": shard_bytes,
                        "sha256": {suffix: sha256(temporary / f"{name}.{suffix}") for suffix in ("bin", "docs")},
                    }
                )
            if not shards:
                raise UserError(f"no text is left for the {split} split: give more text, or other text to hold out")
            entry["splits"][split] = {key: sum(shard[key] for shard in shards) for key in COUNTS} | {"shards": shards}
        write_json(temporary / MANIFEST, manifest)
    return manifest


COUNTS = ("tokens", "documents", "bytes")
REMOVED = ("duplicates", "contaminated", "broken", "empty")


def totals(manifest: dict[str, Any], split: str) -> dict[str, int]:
    """Tokens, documents and bytes of a split over all sources."""
    splits = [entry["splits"][split] for entry in manifest["sources"].values()]
    return {key: sum(one[key] for one in splits) for key in COUNTS}


def _group(
    documents: Iterable[tuple[list[int], int]], end_of_text: int, tokens_per_shard: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Documents to (tokens, document offsets, bytes) of one shard at a time; a document is never cut."""
    tokens: list[int] = []
    offsets: list[int] = []
    num_bytes = 0
    for ids, document_bytes in documents:
        offsets.append(len(tokens))
        tokens += ids
        tokens.append(end_of_text)
        num_bytes += document_bytes
        if len(tokens) >= tokens_per_shard:
            yield tokens, offsets, num_bytes
            tokens, offsets, num_bytes = [], [], 0
    if tokens:
        yield tokens, offsets, num_bytes


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every shard file present and of the right size.

    Raises:
        UserError: no shards here, or a file is missing or truncated (named).
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MANIFEST}; `scratch-gpt data prepare --output {folder}` makes token shards"
        )
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has the format {manifest.get('format')!r}, not {FORMAT!r}: prepare the data again")
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for file, shard in _shard_files(folder, manifest):
        expected = shard["tokens"] * itemsize if file.suffix == ".bin" else shard["documents"] * 8
        actual = file.stat().st_size if file.is_file() else 0
        if actual != expected:
            raise UserError(f"{file} has {actual:,} bytes, the manifest says {expected:,}: prepare the data again")
    return manifest


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 of all tokens in their order, for a run to know its data by."""
    checksums = [
        shard["sha256"]["bin"]
        for entry in manifest["sources"].values()
        for split in entry["splits"].values()
        for shard in split["shards"]
    ]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def verify_checksums(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises a UserError that names the first file whose content is not what was written."""
    for file, shard in _shard_files(folder, manifest):
        if sha256(file) != shard["sha256"][file.suffix[1:]]:
            raise UserError(f"{file}: its checksum is not the manifest's, the file is damaged: prepare the data again")


def _shard_files(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for entry in manifest["sources"].values():
        for split in entry["splits"].values():
            for shard in split["shards"]:
                for suffix in ("bin", "docs"):
                    yield folder / f"{shard['name']}.{suffix}", shard


class TokenStream:
    """The tokens of one split as a ring: what follows the last token is the first.

    Since every document ends with end-of-text, so does the ring, and the first document is preceded by one as well.
    """

    def __init__(self, arrays: Sequence[np.ndarray], num_bytes: int, documents: Sequence[np.ndarray] | None = None):
        """``documents``: for each array, where documents begin in it (left out: one document an array)."""
        self.arrays, self.num_bytes = arrays, num_bytes
        self.starts = np.cumsum([0] + [len(array) for array in arrays])
        self._documents = [np.zeros(1, dtype=np.int64) for _ in arrays] if documents is None else documents

    @classmethod
    def open(cls, folder: Path, split: str, manifest: dict[str, Any], source: str | None = None) -> "TokenStream":
        """One split of a source, or of all sources one after the other, memory-mapped."""
        entries = manifest["sources"].values() if source is None else [manifest["sources"][source]]
        splits = [entry["splits"][split] for entry in entries]
        names = [shard["name"] for one in splits for shard in one["shards"]]
        arrays = [np.memmap(folder / f"{name}.bin", dtype=manifest["dtype"], mode="r") for name in names]
        documents = [np.memmap(folder / f"{name}.docs", dtype="<u8", mode="r") for name in names]
        return cls(arrays, sum(one["bytes"] for one in splits), documents)

    @classmethod
    def of_documents(cls, documents: Iterable[tuple[list[int], int]], end_of_text: int) -> "TokenStream":
        """Documents, given as (token ids, UTF-8 bytes), in memory."""
        encoded = list(documents)
        tokens = [token for ids, _ in encoded for token in (*ids, end_of_text)]
        starts = np.cumsum([0] + [len(ids) + 1 for ids, _ in encoded])[:-1]
        return cls([np.asarray(tokens)], sum(num_bytes for _, num_bytes in encoded), [starts])

    def document_starts(self) -> np.ndarray:
        """Where each document begins in the ring, ascending: (documents,) int64. Read at the first call, then kept."""
        return self._document_starts

    @cached_property
    def _document_starts(self) -> np.ndarray:
        pairs = zip(self._documents, self.starts[:-1], strict=True)
        return np.concatenate([offsets.astype(np.int64) + start for offsets, start in pairs])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """``length`` tokens from position ``start`` (any integer) on, as int64."""
        pieces = []
        position = start % len(self)
        while length > 0:
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            offset = position - int(self.starts[shard])
            piece = self.arrays[shard][offset : offset + length]
            pieces.append(piece.astype(np.int64))
            length -= len(piece)
            position = (position + len(piece)) % len(self)
        return np.concatenate(pieces)
