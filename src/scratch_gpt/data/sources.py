"""Where text comes from: the bundled corpus, or the user's UTF-8 files, read as a stream of documents.

A document ends at a line that holds only ``<|endoftext|>``, and at the end of its file. One line is in memory at a time
until its document is complete, and a byte that is not UTF-8 is reported with its file and offset.
"""

import glob
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from scratch_gpt.config import TextSettings
from scratch_gpt.errors import UserError
from scratch_gpt.files import sha256

DOCUMENT_SEPARATOR = "<|endoftext|>"
FEW_DOCUMENTS = 20
"""Below this number a split by whole documents is too coarse: the end of each document is held out instead."""

Errors = Literal["strict", "replace"]


def bundled_corpus(split: Literal["train", "valid"]) -> Path:
    """File of the default corpus (``corpus/SOURCE.md`` beside it names its source)."""
    return Path(str(files("scratch_gpt.data") / "corpus" / f"austen3_{split}.txt"))


def find_files(corpus: str) -> list[Path]:
    """The files that ``corpus`` (a file, a folder of .txt files, or a glob) names, sorted.

    Raises:
        UserError: nothing is there, or nothing but empty files.
    """
    path = Path(corpus).expanduser()
    if path.is_dir():
        found = sorted(path.glob("**/*.txt"))
        missing = f"the folder {corpus} holds no .txt file"
    else:
        found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        missing = f"there is no text file {corpus}; give a file, a folder of .txt files or a glob"
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(missing)
    if not any(file.stat().st_size for file in found):
        raise UserError(f"{', '.join(map(str, found[:3]))}: empty, there is no text to learn from")
    return found


def read_documents(paths: Iterable[Path], errors: Errors = "strict") -> Iterator[str]:
    """The documents of ``paths`` in order; blank ones are left out.

    Raises:
        UserError: a byte that is not UTF-8 (with ``errors="strict"``), with file and byte offset.
    """
    for path in paths:
        lines: list[str] = []
        offset = 0
        with path.open("rb") as file:
            for raw in file:
                try:
                    line = raw.decode("utf-8", errors)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}). "
                        "Convert the file, or go on with --errors replace."
                    ) from error
                offset += len(raw)
                if line.strip() == DOCUMENT_SEPARATOR:
                    yield from _document(lines)
                    lines = []
                else:
                    lines.append(line)
        yield from _document(lines)


def _document(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).rstrip("\n")
    if text.strip():
        yield text


def split_documents(settings: TextSettings) -> tuple[Iterable[str], Iterable[str], str]:
    """Training documents, held-out documents, and one sentence that says how they were held out.

    The two iterables read their files anew at each pass and hold one document at a time.
    """
    if settings.corpus is None:
        train, valid = [bundled_corpus("train")], [bundled_corpus("valid")]
        return _Documents(train), _Documents(valid), "the last 5% of each document"
    paths = find_files(settings.corpus)
    documents = _Documents(paths, settings.errors)
    if settings.validation_corpus is not None:
        held_out = _Documents(find_files(settings.validation_corpus), settings.errors)
        return documents, held_out, f"{Path(settings.validation_corpus).name}, held out"
    share = settings.validation_fraction
    if not 0 < share < 1:
        raise UserError(f"--validation-fraction is {share}; it must lie between 0 and 1")
    if len(list(itertools.islice(documents, FEW_DOCUMENTS))) < FEW_DOCUMENTS:
        how = f"the last {share:.0%} of each document"
        return _Parts(documents, share, "head"), _Parts(documents, share, "tail"), how
    return _Chosen(documents, share, False), _Chosen(documents, share, True), f"{share:.0%} of the documents, by hash"


def text_fingerprint(settings: TextSettings) -> str:
    """SHA-256 of the text's files and of how they are split: other shards are needed when it changes."""
    paths = (
        [bundled_corpus("train"), bundled_corpus("valid")] if settings.corpus is None else find_files(settings.corpus)
    )
    if settings.validation_corpus is not None:
        paths += find_files(settings.validation_corpus)
    digests = [sha256(path) for path in paths]
    return hashlib.sha256(repr((digests, settings.validation_fraction, settings.errors)).encode()).hexdigest()


class _Documents:
    """Re-iterable documents of some files."""

    def __init__(self, paths: Sequence[Path], errors: Errors = "strict"):
        self.paths, self.errors = paths, errors

    def __iter__(self) -> Iterator[str]:
        return read_documents(self.paths, self.errors)


class _Chosen:
    """The held-out documents, or the others; which is which depends on a document's own text alone."""

    def __init__(self, documents: Iterable[str], share: float, held_out: bool):
        self.documents, self.share, self.held_out = documents, share, held_out

    def __iter__(self) -> Iterator[str]:
        return (document for document in self.documents if is_held_out(document, self.share) == self.held_out)


class _Parts:
    """The beginning or the end of each document, cut at a line's end."""

    def __init__(self, documents: Iterable[str], share: float, part: Literal["head", "tail"]):
        self.documents, self.share, self.part = documents, share, part

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            wanted = int(len(document) * (1 - self.share))
            cut = document.find("\n", wanted) + 1 or document.find(" ", wanted) + 1 or wanted
            text = document[:cut] if self.part == "head" else document[cut:]
            if text.strip():
                yield text


def is_held_out(document: str, share: float) -> bool:
    """Whether ``document`` falls into the validation split: stable when other documents come or go."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64
