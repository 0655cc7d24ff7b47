"""Where text comes from: the bundled corpus, the user's files, or datasets; and which of it is held out.

A source has a name, under which its shards are kept and training weighs it. ``records.py`` reads its documents.
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
from scratch_gpt.data.records import Errors, ReadOptions, check_template, read_piece
from scratch_gpt.errors import UserError
from scratch_gpt.files import sha256

FEW_DOCUMENTS = 20
"""Below this number a split by whole documents is too coarse: the end of each document is held out instead."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Source:
    """One text. ``held_out`` are places of their own; without them ``rule`` splits the documents of ``places``."""

    name: str
    origin: str
    """Where the text is from, for people."""
    places: tuple[Location, ...]
    held_out: tuple[Location, ...]
    rule: Literal["places", "hash", "ends"]
    validation_fraction: float
    reading: ReadOptions
    how: str
    """A sentence that says what is held out."""

    def documents(self, split: Split) -> Iterator[str]:
        """What belongs to ``split``, one document in memory at a time; broken records are treated as ``reading`` says."""
        places = self.held_out if self.rule == "places" and split == "validation" else self.places
        for document in read_places(places, self.reading):
            for its_split, text in self.portions(document, split):
                if its_split == split:
                    yield text

    def portions(self, document: str, split: Split, digest: bytes | None = None) -> Iterator[tuple[Split, str]]:
        """(split, text) of what a document gives to the splits; ``split`` is the one its place belongs to, if any.

        ``digest``: of the document, where it is known already (see :func:`document_digest`).
        """
        if self.rule == "places":
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
    """File of the default corpus (``corpus/SOURCE.md`` beside it names its source)."""
    return Path(str(files("scratch_gpt.data") / "corpus" / f"austen3_{split}.txt"))


def find_files(corpus: str) -> list[Path]:
    """The files that ``corpus`` (a file, a folder of text files, or a glob) names, sorted.

    Raises:
        UserError: nothing is there, or nothing but empty files.
    """
    path = Path(corpus).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.glob("**/*") if _is_known(file))
        missing = f"the folder {corpus} holds no .txt file, nor .jsonl, .parquet or .arrow"
    else:
        found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        missing = f"there is no text file {corpus}; give a file, a folder of .txt files or a glob"
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(missing)
    if not any(file.stat().st_size for file in found):
        raise UserError(f"{', '.join(map(str, found[:3]))}: empty, there is no text to learn from")
    return found


def _is_known(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    return name.suffix.lower() in KINDS


def read_documents(paths: Iterable[Path], errors: Errors = "strict") -> Iterator[str]:
    """The documents of ``paths`` in order; blank ones are left out.

    Raises:
        UserError: a record that is broken, with its file and place.
    """
    return read_places(paths, ReadOptions(errors=errors))


def read_places(places: Iterable[Location], reading: ReadOptions) -> Iterator[str]:
    for place in places:
        pieces = [FileSlice(place)]
        if isinstance(place, Dataset) and place.streaming:
            pieces = [FileSlice(place, shard) for shard in range(load_dataset(place).num_shards)]
        for piece in pieces:
            yield from read_piece(piece, reading, Counter())


# ------------------------------------------------------------------------------------------------ from settings


def sources_of(settings: TextSettings) -> list[Source]:
    """The texts that the settings name, in their order.

    Raises:
        UserError: a text that is not there, settings that contradict each other.
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
            raise UserError(f"give --{name} or --sources, not both: a source has its own path and validation_path")
    return [_source(name, one, settings) for name, one in settings.sources.items()]


def _bundled(settings: TextSettings) -> Source:
    return Source(
        name="austen",
        origin="three novels of Jane Austen",
        places=(bundled_corpus("train"),),
        held_out=(bundled_corpus("valid"),),
        rule="places",
        validation_fraction=settings.validation_fraction,
        reading=ReadOptions(on_bad_record=settings.on_bad_record),
        how="the last 5% of each document",
    )


def _source(name: str, one: SourceSettings, settings: TextSettings) -> Source:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"a source cannot be called {name!r}: letters, digits, '_', '-' and '.' make its folder's name")
    if (one.path is None) == (one.dataset is None):
        raise UserError(f"the source {name} needs a path or a dataset" + (", not both" if one.path else ""))
    if one.template is not None:
        check_template(one.template)
    reading = ReadOptions(one.column, one.template, settings.encoding_errors, settings.on_bad_record)
    places: tuple[Location, ...]
    if one.path is not None:
        origin, places = Path(one.path).name, tuple(find_files(one.path))
    else:
        assert one.dataset is not None
        parts = [Path(one.dataset).name if Path(one.dataset).exists() else one.dataset, one.subset, one.split]
        origin = " ".join(part for part in parts if part)
        places = (Dataset(one.dataset, one.subset, one.split, one.streaming),)

    share = settings.validation_fraction
    held_out: tuple[Location, ...] = ()
    rule: Literal["places", "hash", "ends"]
    if one.validation_path is not None:
        held_out = tuple(find_files(one.validation_path))
        rule, how = "places", f"{Path(one.validation_path).name}, held out"
    elif not 0 < share < 1:
        raise UserError(f"--validation-fraction is {share}; it must lie between 0 and 1")
    elif len(list(itertools.islice(read_places(places, reading), FEW_DOCUMENTS))) < FEW_DOCUMENTS:
        rule, how = "ends", f"the last {share:.0%} of each document"
    else:
        rule, how = "hash", f"{share:.0%} of the documents, by hash"
    return Source(name, origin, places, held_out, rule, share, reading, how)


def split_documents(settings: TextSettings) -> tuple[Iterable[str], Iterable[str], str]:
    """Training documents, held-out documents, and one sentence that says how they were held out.

    The two iterables read their texts anew at each pass and hold one document at a time.
    """
    sources = sources_of(settings)
    how = "; ".join(dict.fromkeys(source.how for source in sources))
    return _Documents(sources, "train"), _Documents(sources, "validation"), how


class _Documents:
    """Re-iterable documents of one split of some sources."""

    def __init__(self, sources: list[Source], split: Split):
        self.sources, self.split = sources, split

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(source.documents(self.split) for source in self.sources)


# ------------------------------------------------------------------------------------------------ what a text is


def text_digest(source: Source) -> str:
    """SHA-256 of the source's files. A dataset is known by the fingerprint that `datasets` gives it, and one that is
    streamed, which nobody has read before, by its name alone."""
    digests = [place.path if isinstance(place, Dataset) else sha256(place) for place in source.places]
    digests += [
        load_dataset(place)._fingerprint
        for place in source.places
        if isinstance(place, Dataset) and not place.streaming
    ]
    digests += ["held out", *(sha256(place) for place in source.held_out if isinstance(place, Path))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def document_digest(document: str) -> bytes:
    """Decides about a document alone, whatever comes before or after it."""
    return hashlib.sha256(document.encode("utf-8")).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document falls into the validation split: stable when other documents come or go."""
    return int.from_bytes(digest[:8], "little") < share * 2**64


def cut_end(document: str, share: float) -> tuple[str, str]:
    """The beginning and the end of a document, cut at a line's end."""
    wanted = int(len(document) * (1 - share))
    cut = document.find("\n", wanted) + 1 or document.find(" ", wanted) + 1 or wanted
    return document[:cut], document[cut:]
