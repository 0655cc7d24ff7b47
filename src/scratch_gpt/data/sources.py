"""Sources of text: the bundled corpus, the user's files, or datasets; and which documents are held out.

A source has a name, which names its shards and its weight in a mixture. ``records.py`` reads its documents.
"""

import glob
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from scratch_gpt.config import SourceSettings, TextSettings
from scratch_gpt.data.inputs import COMPRESSIONS, KINDS, Dataset, FileSlice, Location, load_dataset
from scratch_gpt.data.records import Errors, ReadOptions, check_template, read_slice
from scratch_gpt.errors import UserError
from scratch_gpt.files import sha256

FEW_DOCUMENTS = 20
"""Below this number a split by documents is too coarse, and the end of each document is held out instead."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Source:
    """A named text and its split.

    ``rule``: "files" takes the validation split from ``validation_locations``; "hash" splits the documents of
    ``locations`` by hash; "ends" cuts each document near its end.
    """

    name: str
    origin: str
    """Human-readable origin of the text."""
    locations: tuple[Location, ...]
    validation_locations: tuple[Location, ...]
    rule: Literal["files", "hash", "ends"]
    validation_fraction: float
    read_options: ReadOptions
    split_description: str
    """Human-readable description of what is held out."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of ``split``, one in memory at a time."""
        locations = self.validation_locations if self.rule == "files" and split == "validation" else self.locations
        for document in read_locations(locations, self.read_options):
            for its_split, text in self.portions(document, split):
                if its_split == split:
                    yield text

    def portions(self, document: str, split: Split, digest: bytes | None = None) -> Iterator[tuple[Split, str]]:
        """Yield the (split, text) portions of a document.

        ``split``: the split of its file, used by rule "files". ``digest``: the document's digest. Default: computed by
        :func:`document_digest`.
        """
        if self.rule == "files":
            yield split, document
        elif self.rule == "hash":
            digest = digest or document_digest(document)
            yield ("validation" if is_held_out(digest, self.validation_fraction) else "train"), document
        else:
            head, tail = cut_end(document, self.validation_fraction)
            if head.strip():
                yield "train", head
            if tail.strip():
                yield "validation", tail


def bundled_corpus(split: Literal["train", "valid"]) -> Path:
    """Return the path of a split of the bundled corpus (``corpus/SOURCE.md`` documents its origin)."""
    return Path(str(files("scratch_gpt.data") / "corpus" / f"austen3_{split}.txt"))


def find_files(corpus: str) -> list[Path]:
    """Return the files that ``corpus`` (a file, a folder of text files, or a glob) names, sorted.

    Raises:
        UserError: no file matches, or all are empty.
    """
    path = Path(corpus).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.glob("**/*") if _is_known(file))
        missing = f"the folder {corpus} holds no .txt file, and no .jsonl, .parquet or .arrow file either"
    else:
        found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        missing = f"there is no text file {corpus}: provide a file, a folder of text files or a glob"
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(missing)
    if not any(file.stat().st_size for file in found):
        raise UserError(f"{', '.join(map(str, found[:3]))}: empty; provide a file that holds text")
    return found


def _is_known(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    return name.suffix.lower() in KINDS


def read_documents(paths: Iterable[Path], errors: Errors = "strict") -> Iterator[str]:
    """Yield the documents of ``paths`` in order, skipping blank ones.

    Raises:
        UserError: a broken record, with its file and position.
    """
    return read_locations(paths, ReadOptions(errors=errors))


def read_locations(locations: Iterable[Location], read_options: ReadOptions) -> Iterator[str]:
    """Yield the documents of ``locations`` in order. Raises as :func:`~scratch_gpt.data.records.read_slice` does."""
    for location in locations:
        slices = [FileSlice(location)]
        if isinstance(location, Dataset) and location.streaming:
            slices = [FileSlice(location, shard) for shard in range(load_dataset(location).num_shards)]
        for file_slice in slices:
            yield from read_slice(file_slice, read_options, Counter())


# ------------------------------------------------------------------------------------------------ from settings


def build_sources(settings: TextSettings) -> list[Source]:
    """Build the sources that the settings name, in their order.

    Raises:
        UserError: a missing text, or settings that contradict each other.
    """
    if not settings.sources:
        if settings.corpus is None:
            return [_bundled(settings)]
        one = SourceSettings(
            path=settings.corpus,
            column=settings.column,
            template=settings.template,
            validation_path=settings.validation_corpus,
        )
        return [_source("corpus", one, settings)]
    for name in ("corpus", "validation_corpus"):
        if getattr(settings, name) is not None:
            raise UserError(f"give --{name} or --sources, not both: each source has its own path and validation_path")
    return [_source(name, one, settings) for name, one in settings.sources.items()]


def _bundled(settings: TextSettings) -> Source:
    return Source(
        name="austen",
        origin="three novels of Jane Austen",
        locations=(bundled_corpus("train"),),
        validation_locations=(bundled_corpus("valid"),),
        rule="files",
        validation_fraction=settings.validation_fraction,
        read_options=ReadOptions(on_bad_record=settings.on_bad_record),
        split_description="the last 5% of each document",
    )


def _source(name: str, one: SourceSettings, settings: TextSettings) -> Source:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"invalid source name {name!r}: use letters, digits, '_', '-' and '.' (it names a folder)")
    if (one.path is None) == (one.dataset is None):
        raise UserError(f"the source {name} needs a path or a dataset" + (", not both" if one.path else ""))
    if one.template is not None:
        check_template(one.template)
    read_options = ReadOptions(one.column, one.template, settings.encoding_errors, settings.on_bad_record)
    locations: tuple[Location, ...]
    if one.path is not None:
        origin, locations = Path(one.path).name, tuple(find_files(one.path))
    else:
        assert one.dataset is not None
        parts = [Path(one.dataset).name if Path(one.dataset).exists() else one.dataset, one.subset, one.split]
        origin = " ".join(part for part in parts if part)
        locations = (Dataset(one.dataset, one.subset, one.split, one.streaming),)

    fraction = settings.validation_fraction
    validation_locations: tuple[Location, ...] = ()
    rule: Literal["files", "hash", "ends"]
    if one.validation_path is not None:
        validation_locations = tuple(find_files(one.validation_path))
        rule, split_description = "files", f"{Path(one.validation_path).name}, held out"
    elif not 0 < fraction < 1:
        raise UserError(f"--validation-fraction is {fraction}; it must be between 0 and 1 (exclusive)")
    elif len(list(itertools.islice(read_locations(locations, read_options), FEW_DOCUMENTS))) < FEW_DOCUMENTS:
        rule, split_description = "ends", f"the last {fraction:.0%} of each document"
    else:
        rule, split_description = "hash", f"{fraction:.0%} of the documents, by hash"
    return Source(name, origin, locations, validation_locations, rule, fraction, read_options, split_description)


def split_documents(settings: TextSettings) -> tuple[Iterable[str], Iterable[str], str]:
    """Return training documents, held-out documents, and a description of what is held out.

    Both iterables can be iterated repeatedly; each pass rereads the text with one document in memory at a time.
    """
    sources = build_sources(settings)
    how = "; ".join(dict.fromkeys(source.split_description for source in sources))
    return _Documents(sources, "train"), _Documents(sources, "validation"), how


class _Documents:
    """Documents of one split of several sources; can be iterated repeatedly."""

    def __init__(self, sources: list[Source], split: Split):
        self.sources, self.split = sources, split

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(source.documents(self.split) for source in self.sources)


# ------------------------------------------------------------------------------------------------ digests


def text_digest(source: Source) -> str:
    """Return a SHA-256 of the source's files.

    A dataset is identified by its `datasets` fingerprint (private; tests/data/test_private_attributes.py checks it); a
    streamed one, whose content is not known yet, by its name.
    """
    digests = [location.path if isinstance(location, Dataset) else sha256(location) for location in source.locations]
    digests += [
        load_dataset(location)._fingerprint
        for location in source.locations
        if isinstance(location, Dataset) and not location.streaming
    ]
    digests += [
        "held out",
        *(sha256(location) for location in source.validation_locations if isinstance(location, Path)),
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def document_digest(document: str) -> bytes:
    """Return the SHA-256 of a document (32 bytes), by which it is held out or deduplicated."""
    return hashlib.sha256(document.encode("utf-8")).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Return whether a document belongs to the validation split; independent of all other documents."""
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def cut_end(document: str, fraction: float) -> tuple[str, str]:
    """Split off about the last ``fraction`` of a document, at the end of a line or otherwise at a space."""
    wanted = int(len(document) * (1 - fraction))
    cut = document.find("\n", wanted) + 1 or document.find(" ", wanted) + 1 or wanted
    return document[:cut], document[cut:]
