"""Show the content of a folder of token shards: `scratch-gpt data inspect`."""

from pathlib import Path
from typing import Any

import numpy as np

from scratch_gpt.config import DataInspectSettings
from scratch_gpt.data.shards import TokenStream, read_manifest, verify_checksums
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer
from scratch_gpt.errors import UserError

SAMPLE_TOKENS = 128
BOUNDARY = "\n──────── a document ends ────────\n"


def inspect_command(settings: DataInspectSettings) -> None:
    """Print the manifest, verify every checksum, and decode samples of each source with visible document boundaries."""
    folder = Path(settings.path)
    manifest = read_manifest(folder)
    verify_checksums(folder, manifest)
    for key in ("tokenizer", "vocab_size", "dtype", "end_of_text"):
        print(f"{key:<12}{manifest[key]}")
    for name, entry in manifest["sources"].items():
        print(f"\n{name}: {entry['source']}; held out: {entry['held_out']}")
        for split_name, split in entry["splits"].items():
            print(
                f"  {split_name:<12}{split['tokens']:,} tokens, {split['documents']:,} documents, "
                f"{split['bytes']:,} bytes, {len(split['shards'])} shard(s), checksums verified"
            )
        print("  removed     " + ", ".join(f"{count:,} {what}" for what, count in entry["removed"].items()))
        options = {option: value for option, value in entry.get("options", {}).items() if value}
        if options:
            print("  options     " + ", ".join(f"{option} {value!r}" for option, value in options.items()))
    if settings.tokenizer_path is None:
        return
    if fingerprint(settings.tokenizer_path) != manifest["tokenizer"]:
        raise UserError(
            f"{folder} was prepared with a different tokenizer than --tokenizer-path {settings.tokenizer_path}"
        )
    tokenizer = load_tokenizer(settings.tokenizer_path)
    for name in manifest["sources"]:
        stream = TokenStream.open(folder, "train", manifest, source=name)
        for sample in range(min(settings.rows, -(-len(stream) // SAMPLE_TOKENS))):
            length = min(SAMPLE_TOKENS, len(stream) - sample * SAMPLE_TOKENS)
            print(f"\n{name}, train, tokens {sample * SAMPLE_TOKENS} to {sample * SAMPLE_TOKENS + length - 1}:")
            print(decode_tokens(tokenizer, stream.read(sample * SAMPLE_TOKENS, length), manifest["end_of_text"]))


def decode_tokens(tokenizer: Any, tokens: np.ndarray, end_of_text: int) -> str:
    """Decode ``tokens``, (tokens,) int64, marking document boundaries with a line."""
    documents = np.split(tokens, np.flatnonzero(tokens == end_of_text) + 1)
    return BOUNDARY.join(tokenizer.decode(document[document != end_of_text]) for document in documents)
