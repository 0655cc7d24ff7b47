"""Text to token shards: `scratch-gpt data prepare`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scratch_gpt.config import DataPrepareSettings, TextSettings
from scratch_gpt.data.shards import MANIFEST, read_manifest, totals, write_shards
from scratch_gpt.data.sources import split_documents, text_fingerprint
from scratch_gpt.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors

BATCH_CHARACTERS = 4_000_000


def prepare(settings: TextSettings, tokenizer_path: str | Path, output: Path) -> dict[str, Any]:
    """Tokenize the corpus into ``output`` and return the manifest; shards of the same text and tokenizer are kept.

    Raises:
        UserError: unreadable text, no held-out text, a folder that holds something else, a full disk.
    """
    train, valid, held_out = split_documents(settings)
    name = "austen" if settings.corpus is None else "corpus"
    description = {
        "source": "three novels of Jane Austen" if settings.corpus is None else Path(settings.corpus).name,
        "text": text_fingerprint(settings),
        "held_out": held_out,
    }
    made_with = fingerprint(tokenizer_path)
    if (output / MANIFEST).is_file():
        existing = read_manifest(output)
        stored = existing["sources"].get(name, {})
        changed = [key for key, value in description.items() if stored.get(key) != value]
        if existing["tokenizer"] != made_with:
            changed.append("tokenizer")
        if not changed:
            return existing
        raise UserError(
            f"{output} holds shards with another {' and '.join(changed)}: choose another folder or delete it"
        )
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} holds other files: choose another folder")
    tokenizer = load_tokenizer(tokenizer_path)
    backend: Tokenizer = tokenizer.backend_tokenizer
    with disk_errors(f"token shards in {output}"):
        manifest = write_shards(
            output,
            {"train": encode(train, backend), "validation": encode(valid, backend)},
            source=name,
            vocab_size=backend.get_vocab_size(),
            end_of_text=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
            tokenizer=made_with,
            description=description,
        )
    return manifest


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """(token ids, UTF-8 bytes) of each document, several documents at a time on all cores.

    Special tokens that stand in the text are text: only this package writes control tokens.
    """
    tokenizer.encode_special_tokens = True
    batch: list[str] = []
    characters = 0

    def flush() -> Iterator[tuple[list[int], int]]:
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            yield encoding.ids, len(text.encode("utf-8"))

    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield from flush()
            batch, characters = [], 0
    yield from flush()


def summary(manifest: dict[str, Any]) -> str:
    train, validation = totals(manifest, "train"), totals(manifest, "validation")
    held_out = "; ".join(dict.fromkeys(entry["held_out"] for entry in manifest["sources"].values()))
    return (
        f"{train['tokens']:,} training tokens, {validation['tokens']:,} held out ({held_out}), "
        f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes a token"
    )


def prepare_command(settings: DataPrepareSettings) -> None:
    """`scratch-gpt data prepare`."""
    manifest = prepare(settings, settings.tokenizer_path, Path(settings.output))
    print(f"{settings.output}: {summary(manifest)}")
