"""Import and export datatrove's token files: `scratch-gpt data import-datatrove` and `data export-datatrove`.

Beyond one machine, huggingface/datatrove filters, deduplicates and tokenizes on Slurm or Ray, and the output of
its ``DocumentTokenizer`` becomes shards for training here. Its format (datatrove's pipeline/tokens/tokenizer.py) is a
set of files for each rank:

    X.ds            token ids, little-endian, 2 or 4 bytes each; each document ends with end-of-text
    X.ds.index      uint64: where each document ends, in tokens
    X.ds.metadata   text, optional: tokenizer|bytes per token, number of tokens, human-readable
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from scratch_gpt.config import DatatroveExportSettings, DatatroveImportSettings
from scratch_gpt.data.shards import read_manifest, write_shards
from scratch_gpt.data.sources import is_held_out
from scratch_gpt.data.tokenizer import end_of_text, fingerprint, load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, new_folder, sha256

DOCUMENTS_PER_BATCH = 1024


def import_command(settings: DatatroveImportSettings) -> None:
    """`scratch-gpt data import-datatrove`."""
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"{output} already exists: choose another --output or delete it")
    tokenizer = load_tokenizer(settings.tokenizer_path)
    backend: Tokenizer = tokenizer.backend_tokenizer
    vocab_size, end = max(backend.get_vocab().values()) + 1, end_of_text(tokenizer)
    train = find_token_files(settings.path)
    held_out = train if settings.validation_path is None else find_token_files(settings.validation_path)
    digests = "\n".join(sha256(file) for file in dict.fromkeys([*train, *held_out]))

    def documents(files: list[Path], validation: bool) -> Iterator[tuple[np.ndarray, int]]:
        read: Iterator[np.ndarray] = itertools.chain.from_iterable(
            read_token_file(file, end, vocab_size) for file in files
        )
        if settings.validation_path is None:
            fraction = settings.validation_fraction
            read = (ids for ids in read if is_held_out(hashlib.sha256(ids.tobytes()).digest(), fraction) == validation)
        while batch := list(itertools.islice(read, DOCUMENTS_PER_BATCH)):
            texts = backend.decode_batch([ids.tolist() for ids in batch], skip_special_tokens=False)
            yield from zip(batch, (len(text.encode("utf-8")) for text in texts), strict=True)

    how = "by hash" if settings.validation_path is None else f"{Path(settings.validation_path).name}, held out"
    with disk_errors(f"token shards in {output}"):
        manifest = write_shards(
            output,
            {"train": documents(train, False), "validation": documents(held_out, True)},
            source=settings.name,
            vocab_size=vocab_size,
            end_of_text=end,
            tokenizer=fingerprint(settings.tokenizer_path),
            description={
                "source": f"{Path(settings.path).name}, tokenized by datatrove",
                "text": hashlib.sha256(digests.encode()).hexdigest(),
                "held_out": f"{settings.validation_fraction:.0%} of the documents, {how}" if how == "by hash" else how,
            },
        )
    for split, entry in manifest["sources"][settings.name]["splits"].items():
        print(f"{output}: {split} {entry['tokens']:,} tokens in {entry['documents']:,} documents")


def find_token_files(path: str) -> list[Path]:
    """Return the ``.ds`` files of a folder, sorted; ``path`` may also be a single file.

    Raises:
        UserError: there are none, or one has no index file.
    """
    folder = Path(path)
    found = [folder] if folder.is_file() else sorted(folder.glob("**/*.ds"))
    if not found:
        raise UserError(f"{path} holds no .ds file: set --path to the output folder of datatrove's DocumentTokenizer")
    for file in found:
        if not _index(file).is_file():
            raise UserError(
                f"{_index(file)}, which stores where documents end, is missing: run datatrove with save_index=True"
            )
    return found


def read_token_file(file: Path, end_of_text: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the token ids of each document, (tokens,) uint16 or uint32, without end-of-text.

    Raises:
        UserError: file and index do not match, or a token id exceeds the vocabulary.
    """
    ends = np.fromfile(_index(file), dtype="<u8").astype(np.int64)
    total = int(ends[-1]) if len(ends) else 0
    size = file.stat().st_size
    if total == 0 and size == 0:
        return
    if total == 0 or size not in (2 * total, 4 * total) or (np.diff(ends) < 0).any():
        raise UserError(
            f"{file} has {size:,} bytes, which does not match its index ({total:,} tokens): one of the two is damaged; "
            "run datatrove again"
        )
    tokens = np.memmap(file, dtype="<u2" if size == 2 * total else "<u4", mode="r")
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        ids = np.asarray(tokens[start:end])
        if len(ids) and int(ids.max()) >= vocab_size:
            raise UserError(
                f"{file}: token id {int(ids.max())} at position {start + int(ids.argmax())} is not in the tokenizer's "
                f"vocabulary of {vocab_size:,}: set --tokenizer-path to the tokenizer that datatrove used"
            )
        if len(ids) and ids[-1] == end_of_text:
            ids = ids[:-1]
        if len(ids):
            yield ids


def export_command(settings: DatatroveExportSettings) -> None:
    """`scratch-gpt data export-datatrove`."""
    folder, output = Path(settings.path), Path(settings.output)
    if output.exists():
        raise UserError(f"{output} already exists: choose another --output or delete it")
    manifest = read_manifest(folder)
    itemsize = np.dtype(manifest["dtype"]).itemsize
    made_with = settings.tokenizer_path or f"scratch_gpt-{manifest['tokenizer'][:12]}"
    if settings.tokenizer_path is not None and fingerprint(settings.tokenizer_path) != manifest["tokenizer"]:
        raise UserError(
            f"{folder} was prepared with a different tokenizer than --tokenizer-path {settings.tokenizer_path}"
        )
    with disk_errors(f"token files in {output}"), new_folder(output) as temporary:
        for source, entry in manifest["sources"].items():
            for split, one in entry["splits"].items():
                target = temporary / source / split
                target.mkdir(parents=True)
                for rank, shard in enumerate(one["shards"]):
                    file = target / f"{rank:05d}.ds"
                    starts = np.fromfile(folder / f"{shard['name']}.docs", dtype="<u8")
                    np.append(starts[1:], shard["tokens"]).astype("<u8").tofile(_index(file))
                    np.memmap(folder / f"{shard['name']}.bin", dtype=manifest["dtype"], mode="r").tofile(file)
                    file.with_name(f"{file.name}.metadata").write_text(
                        f"{made_with}|{itemsize}\n{shard['tokens']}\n{shard['tokens'] / 1e6:.3g} MT", encoding="utf-8"
                    )
                print(f"{output}/{source}/{split}: {one['tokens']:,} tokens of {itemsize} bytes")


def _index(file: Path) -> Path:
    return file.with_name(f"{file.name}.index")
