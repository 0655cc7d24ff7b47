"""What is in a folder of token shards: `scratch-gpt data inspect`."""

from pathlib import Path

from scratch_gpt.config import DataInspectSettings
from scratch_gpt.data.shards import TokenStream, read_manifest, verify_checksums
from scratch_gpt.data.tokenizer import fingerprint, load_tokenizer
from scratch_gpt.errors import UserError

ROW_LENGTH = 128


def inspect_command(settings: DataInspectSettings) -> None:
    """Print the manifest, verify every checksum, decode the first rows with their document boundaries visible."""
    folder = Path(settings.path)
    manifest = read_manifest(folder)
    verify_checksums(folder, manifest)
    for key in ("tokenizer", "vocab_size", "dtype"):
        print(f"{key:<12}{manifest[key]}")
    for name, entry in manifest["sources"].items():
        print(f"{name}: {entry['source']}; held out: {entry['held_out']}")
        for split_name, split in entry["splits"].items():
            print(
                f"  {split_name:<12}{split['tokens']:,} tokens, {split['documents']:,} documents, "
                f"{split['bytes']:,} bytes, {len(split['shards'])} shard(s), checksums verified"
            )
    if settings.tokenizer_path is None:
        return
    if fingerprint(settings.tokenizer_path) != manifest["tokenizer"]:
        raise UserError(f"{folder} was made with another tokenizer than {settings.tokenizer_path}")
    tokenizer = load_tokenizer(settings.tokenizer_path)
    stream = TokenStream.open(folder, "train", manifest)
    for row in range(settings.rows):
        print(f"\ntrain, tokens {row * ROW_LENGTH} to {(row + 1) * ROW_LENGTH - 1}:")
        print(tokenizer.decode(stream.read(row * ROW_LENGTH, ROW_LENGTH)))
