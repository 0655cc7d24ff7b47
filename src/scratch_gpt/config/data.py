"""Settings of the tokenizer and data commands."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from scratch_gpt.config.fields import setting


@dataclass
class SourceSettings:
    """One of several texts: give ``path`` or ``dataset``."""

    path: str | None = None
    """File, folder or glob: .txt, .jsonl, .parquet or .arrow; .txt and .jsonl also as .gz, .zst or .xz."""
    dataset: str | None = None
    """Dataset of the Hugging Face Hub by name, or a local folder that `datasets` saved or loads."""
    subset: str | None = None
    """Of the dataset, where it has several."""
    split: str = "train"
    """Of the dataset."""
    streaming: bool = False
    """Read the dataset from where it lies instead of downloading it first."""
    column: str = "text"
    """The column (or JSON field) that holds the text."""
    template: str | None = None
    """Text made from several columns instead, for example "{title}: {text}"."""
    validation_path: str | None = None
    """Held-out text in a place of its own; left out: taken from this source, see validation_fraction."""


@dataclass
class TextSettings:
    """Which text, and what is held out of it."""

    corpus: str | None = None
    """File, folder or glob (.txt, .jsonl, .parquet, .arrow); left out: bundled corpus (three novels of Jane Austen)."""
    column: str = "text"
    """The column (or JSON field) of the corpus that holds the text."""
    template: str | None = None
    """Text made from several columns of the corpus instead, for example "{title}: {text}"."""
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    """Several texts instead of one corpus: a name for each, and where it is."""
    validation_corpus: str | None = None
    """Held-out text in a place of its own; left out: taken from the corpus, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Share of the documents held out (by hash); of a corpus of under 20 documents, the end of each of them."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8, and NUL: an error, or U+FFFD in their place."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A broken record (not JSON, no such column, not UTF-8): stop there, or leave it out and count it."""


@dataclass
class TokenizerSettings:
    """The byte-level BPE tokenizer."""

    vocab_size: int = 2048
    """Number of tokens: the special ones, the 256 bytes and the merges."""
    split_pattern: Literal["gpt4", "gpt2"] = "gpt4"
    """Where text is cut before merging: as GPT-4 does (a sign may lead a word, line breaks apart) or as GPT-2 does."""
    max_digits: Literal[1, 2, 3] = 3
    """Longest run of digits that stays together."""
    max_characters: int = setting(200_000_000, more_than=0)
    """Train on at most this much of the corpus (memory grows with its variety)."""
    max_document_characters: int = setting(1_000_000, more_than=0)
    """Of each document, train on its beginning up to this length."""


@dataclass
class TokenizerTrainSettings(TextSettings):
    """Train a byte-level BPE tokenizer on a corpus, or take an existing one."""

    output: str = "runs/tokenizer"
    """Folder for the tokenizer, in the form that AutoTokenizer loads."""
    from_: str | None = None
    """Take this tokenizer (folder, or name on the Hub) instead of training one."""
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)


@dataclass
class TokenizerReportSettings:
    """Compare tokenizers on texts: bytes per token, share of the vocabulary in use, round trip."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/tokenizer"])
    """Folders of tokenizers (or names on the Hub), as a list: [runs/tokenizer, other/gpt2]."""
    texts: list[str] = field(default_factory=list)
    """Files, folders or globs, each a row of the table; left out: the held-out part of the bundled corpus."""
    column: str = "text"
    """The column (or JSON field) that holds the text."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    max_characters: int = setting(5_000_000, more_than=0)
    """Of each text, look at this much."""


@dataclass
class DataPrepareSettings(TextSettings):
    """Tokenize texts into shards, with a held-out validation split. The same command goes on after an interruption."""

    tokenizer_path: str = "runs/tokenizer"
    """Folder of a tokenizer, for example one made by `tokenizer train`."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    workers: int | None = setting(None, more_than=0)
    """Processes; left out: as many as there are cores. The result is the same for any number."""
    deduplicate: bool = False
    """Keep only the first of documents with the same text, over all sources."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files: documents that share 13 words in a row with any of their texts are left out."""


@dataclass
class DataInspectSettings:
    """Print the manifest of token shards, verify every checksum and decode a few rows."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to decode sample rows with."""
    rows: int = setting(2, at_least=0)
    """Rows to decode of each source."""


@dataclass
class DatatroveImportSettings:
    """Make token shards from the .ds files that datatrove's DocumentTokenizer wrote."""

    path: str
    """Folder of .ds files with their .ds.index, or one such file."""
    tokenizer_path: str = "runs/tokenizer"
    """Folder of the tokenizer that they were made with."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    name: str = "corpus"
    """Of the source."""
    validation_path: str | None = None
    """Held-out .ds files in a place of their own; left out: taken from the others, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Share of the documents held out, by a hash of their tokens."""


@dataclass
class DatatroveExportSettings:
    """Write token shards as .ds files for datatrove's tools, a folder for each source and split."""

    output: str
    """Folder for the .ds, .ds.index and .ds.metadata files."""
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to name in the metadata."""
