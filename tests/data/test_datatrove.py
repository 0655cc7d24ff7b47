"""Import and export of datatrove's token files, which the tests write from the definition of the format."""

import struct

import numpy as np
import pytest

from scratch_gpt.cli import main
from scratch_gpt.config import TextSettings
from scratch_gpt.data.prepare import prepare
from scratch_gpt.data.shards import TokenStream, read_manifest, verify_checksums
from scratch_gpt.data.tokenizer import load_tokenizer


def write(folder, name, documents, form="H"):
    folder.mkdir(exist_ok=True)
    tokens = [token for document in documents for token in document]
    (folder / f"{name}.ds").write_bytes(struct.pack(f"<{len(tokens)}{form}", *tokens))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    (folder / f"{name}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))


def import_datatrove(folder, tokenizer_folder, output, *more):
    arguments = ["--path", str(folder), "--tokenizer-path", str(tokenizer_folder), "--output", str(output), *more]
    return main(["data", "import-datatrove", *arguments])


@pytest.mark.parametrize("form", ["H", "I"])
def test_import_keeps_every_document_once_with_one_end_of_text_token(form, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [f"Document {i} of naïve people." for i in range(100)]
    documents = [[*tokenizer(text)["input_ids"], 0] for text in texts]
    write(tmp_path / "ds", "00000_shuffled", documents[:60], form)
    write(tmp_path / "ds", "00001_shuffled", [document[:-1] for document in documents[60:]], form)  # eos_token=None
    assert import_datatrove(tmp_path / "ds", tokenizer_folder, tmp_path / "data", "--name", "web") == 0
    manifest = read_manifest(tmp_path / "data")
    verify_checksums(tmp_path / "data", manifest)
    found = []
    for split in ("train", "validation"):
        stream = TokenStream.open(tmp_path / "data", split, manifest, source="web")
        documents_read = np.split(stream.read(0, len(stream)), stream.document_starts()[1:])
        found += [ids.tolist() for ids in documents_read]
        assert stream.num_bytes == sum(len(tokenizer.decode(ids[:-1]).encode()) for ids in documents_read)
    assert sorted(found) == sorted(documents)


def test_export_and_import_reproduce_the_shards(corpus, tokenizer_folder, tmp_path, capsys):
    prepare(TextSettings(corpus=str(corpus)), tokenizer_folder, tmp_path / "data", tokens_per_shard=9000)
    arguments = ["--path", str(tmp_path / "data"), "--output", str(tmp_path / "ds")]
    assert main(["data", "export-datatrove", *arguments, "--tokenizer-path", str(tokenizer_folder)]) == 0
    train = tmp_path / "ds" / "corpus" / "train"
    shard = read_manifest(tmp_path / "data")["sources"]["corpus"]["splits"]["train"]["shards"][0]
    assert (train / "00000.ds.metadata").read_text().splitlines()[:2] == [f"{tokenizer_folder}|2", str(shard["tokens"])]
    index = np.fromfile(train / "00000.ds.index", dtype="<u8")
    assert (len(index), index[-1]) == (shard["documents"], shard["tokens"])
    tokens = np.fromfile(train / "00000.ds", dtype="<u2")
    assert (tokens[index - 1] == 0).all()
    held_out = ["--validation-path", str(tmp_path / "ds" / "corpus" / "validation")]
    assert import_datatrove(train, tokenizer_folder, tmp_path / "back", *held_out) == 0
    for split in ("train", "validation"):
        before, after = (
            TokenStream.open(tmp_path / folder, split, read_manifest(tmp_path / folder)) for folder in ("data", "back")
        )
        assert np.array_equal(before.read(0, len(before)), after.read(0, len(after)))
        assert np.array_equal(before.document_starts(), after.document_starts())
        assert before.num_bytes == after.num_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.ds.index").unlink(), "a.ds.index, which stores where documents end, is missing"),
        (lambda folder: (folder / "a.ds").write_bytes(b"123"), "a.ds has 3 bytes, which does not match its index"),
        (
            lambda folder: write(folder, "a", [[1, 2], [9, 9999, 0]]),
            "token id 9999 at position 3 is not in the tokenizer's vocabulary",
        ),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no .ds file"),
    ],
)
def test_invalid_token_files_are_refused_by_name(damage, message, tokenizer_folder, tmp_path, capsys):
    write(tmp_path / "ds", "a", [[5, 6, 0]] * 100)
    damage(tmp_path / "ds")
    assert import_datatrove(tmp_path / "ds", tokenizer_folder, tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
