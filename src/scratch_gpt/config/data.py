"""Settings of the tokenizer and data commands."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from scratch_gpt.config.fields import setting


@dataclass
class SourceSettings:
    """One of several texts. Give either ``path`` or ``dataset``."""

    path: str | None = None
    """File, folder or glob: .txt, .jsonl, .parquet or .arrow; .txt and .jsonl also as .gz, .zst or .xz."""
    dataset: str | None = None
    """Dataset of the Hugging Face Hub by name, or a local folder that `datasets` saved or loads."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    split: str = "train"
    """Split of the dataset."""
    streaming: bool = False
    """Stream the dataset instead of downloading it first."""
    column: str = "text"
    """Column (or JSON field) that holds the text."""
    template: str | None = None
    """Build the text from several columns instead, for example "{title}: {text}"."""
    validation_path: str | None = None
    """File, folder or glob with the held-out text. Default: held out of this source, see validation_fraction."""


@dataclass
class TextSettings:
    """The text to read, and the part of it to hold out for validation."""

    HELP_TITLE: ClassVar[str] = "Text"

    corpus: str | None = setting(None, common=True)
    """File, folder or glob (.txt, .jsonl, .parquet, .arrow). Default: the bundled corpus (three novels of Jane
    Austen)."""
    column: str = "text"
    """Column (or JSON field) of the corpus that holds the text."""
    template: str | None = None
    """Build the text from several columns of the corpus instead, for example "{title}: {text}"."""
    sources: dict[str, SourceSettings] = field(default_factory=dict)
    """Several texts instead of one corpus, as {NAME: {path: FILE}, ...}."""
    validation_corpus: str | None = setting(None, common=True)
    """File, folder or glob with the held-out text. Default: held out of the corpus, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Fraction of the documents to hold out, chosen by hash; with fewer than 20 documents, the end of each."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8, and NUL: stop with an error (strict), or replace them by U+FFFD."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A broken record (not JSON, no such column, not UTF-8): stop with an error, or skip it and count it."""


@dataclass
class TokenizerSettings:
    """The byte-level BPE tokenizer."""

    vocab_size: int = 2048
    """Number of tokens: special tokens, the 256 bytes, and the merges."""
    split_pattern: Literal["gpt4", "gpt2"] = "gpt4"
    """Rule that splits text before merging: GPT-4's (a punctuation mark may start a word, line breaks are separate) or
    GPT-2's."""
    max_digits: Literal[1, 2, 3] = 3
    """Longest run of digits in one token."""
    max_characters: int = setting(200_000_000, more_than=0)
    """Train on at most this many characters of the corpus; memory grows with the number of distinct words."""
    max_document_characters: int = setting(1_000_000, more_than=0)
    """Train on at most this many characters of each document, from its beginning."""


@dataclass
class TokenizerTrainSettings(TextSettings):
    """Train a byte-level BPE tokenizer on a corpus, or copy an existing one."""

    output: str = "runs/tokenizer"
    """Folder for the tokenizer, which AutoTokenizer loads."""
    from_: str | None = None
    """Use this tokenizer (folder, or name on the Hub) instead of training one."""
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)


@dataclass
class TokenizerReportSettings:
    """Compare tokenizers on texts: bytes per token, fraction of the vocabulary in use, round trip."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/tokenizer"])
    """Folders of tokenizers (or names on the Hub), as a list: [runs/tokenizer, other/gpt2]."""
    texts: list[str] = field(default_factory=list)
    """Files, folders or globs, each one row of the table. Default: the held-out part of the bundled corpus."""
    column: str = "text"
    """Column (or JSON field) that holds the text."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop with an error (strict), or replace them by U+FFFD."""
    max_characters: int = setting(5_000_000, more_than=0)
    """Read at most this many characters of each text."""


@dataclass
class DataPrepareSettings(TextSettings):
    """Tokenize texts into shards, with a held-out validation split. Run the same command again to resume."""

    tokenizer_path: str = "runs/tokenizer"
    """Folder of the tokenizer, for example one from `tokenizer train`."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    workers: int | None = setting(None, more_than=0)
    """Number of processes; the result does not depend on it. Default: one per core."""
    deduplicate: bool = False
    """Keep only the first of several documents with the same text, across all sources."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files: documents that share 13 words in a row with any of their texts are removed."""


@dataclass
class DataInspectSettings:
    """Print the manifest of token shards, verify every checksum and decode a few rows."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to decode sample rows with. Default: rows are not decoded."""
    rows: int = setting(2, at_least=0)
    """Number of rows to decode from each source."""


@dataclass
class DatatroveImportSettings:
    """Convert .ds files written by datatrove's DocumentTokenizer to token shards."""

    path: str
    """Folder of .ds files with their .ds.index, or one such file."""
    tokenizer_path: str = "runs/tokenizer"
    """Folder of the tokenizer that made the .ds files."""
    output: str = "runs/data"
    """Folder for the shards and their manifest."""
    name: str = "corpus"
    """Name of the source in the manifest."""
    validation_path: str | None = None
    """Folder of held-out .ds files. Default: held out of path, see validation_fraction."""
    validation_fraction: float = setting(0.05, more_than=0, below=1)
    """Fraction of the documents to hold out, chosen by a hash of their tokens."""


@dataclass
class DatatroveExportSettings:
    """Convert token shards to .ds files for datatrove's tools, one folder per source and split."""

    output: str
    """Folder for the .ds, .ds.index and .ds.metadata files."""
    path: str = "runs/data"
    """Folder of the shards."""
    tokenizer_path: str | None = None
    """Tokenizer to record in the metadata. Default: none."""
