"""Compare tokenizers on several texts: `scratch-gpt tokenizer report`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scratch_gpt.config import TokenizerReportSettings
from scratch_gpt.data.encoding import in_batches, special_tokens_as_text
from scratch_gpt.data.records import ReadOptions
from scratch_gpt.data.sources import bundled_corpus, find_files, read_locations
from scratch_gpt.data.tokenizer import any_tokenizer

BATCH_CHARACTERS = 500_000


@dataclass
class Measurement:
    """Counts of one tokenizer on one text."""

    num_bytes: int = 0
    num_tokens: int = 0
    documents: int = 0
    changed: int = 0
    """Documents that differ from the original after encoding and decoding."""
    seen: np.ndarray | None = None
    """(vocab_size,) bool: which tokens occur."""


def measure(tokenizer: Any, documents: Iterable[str]) -> Measurement:
    """Encode and decode ``documents``. Special tokens in them are encoded as ordinary text."""
    backend = special_tokens_as_text(tokenizer.backend_tokenizer)
    result = Measurement(seen=np.zeros(max(backend.get_vocab().values()) + 1, dtype=bool))
    assert result.seen is not None
    for batch in in_batches(documents, BATCH_CHARACTERS):
        ids = [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
        back = backend.decode_batch(ids, skip_special_tokens=False)
        result.num_bytes += sum(len(text.encode("utf-8")) for text in batch)
        result.num_tokens += sum(map(len, ids))
        result.documents += len(batch)
        result.changed += sum(text != decoded for text, decoded in zip(batch, back, strict=True))
        for tokens in ids:
            result.seen[tokens] = True
    return result


def report_command(settings: TokenizerReportSettings) -> None:
    """`scratch-gpt tokenizer report`: print one row per text and tokenizer."""
    texts = {name: find_files(name) for name in settings.texts} or {"bundled, held out": [bundled_corpus("valid")]}
    tokenizers = {name: any_tokenizer(name) for name in settings.tokenizers}
    read_options = ReadOptions(column=settings.column, errors=settings.encoding_errors)
    head = ("text", "bytes", "tokenizer", "vocabulary", "bytes/token", "in use", "round trip")
    rows: list[tuple[str, ...]] = [head]
    for text, files in texts.items():
        for name, tokenizer in tokenizers.items():
            result = measure(tokenizer, _beginning(read_locations(files, read_options), settings.max_characters))
            assert result.seen is not None
            rows.append(
                (
                    Path(text).name,
                    f"{result.num_bytes:,}",
                    name if len(name) <= 30 else f"...{name[-27:]}",
                    f"{len(result.seen):,}",
                    f"{result.num_bytes / max(result.num_tokens, 1):.3f}",
                    f"{result.seen.mean():.1%}",
                    "exact" if not result.changed else f"{result.changed:,} of {result.documents:,} documents differ",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _beginning(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return
