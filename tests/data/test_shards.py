"""Token shards on disk: content, damage, and the commands that write and show them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.cli import main
from scratch_gpt.config import DataPrepareSettings
from scratch_gpt.data.prepare import prepare
from scratch_gpt.data.shards import TokenStream, read_manifest, token_dtype, verify_checksums, write_shards
from scratch_gpt.data.sources import read_documents, split_documents
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError

FORMAT = {"source": "test", "vocab_size": 100, "end_of_text": 0, "tokenizer": "0", "description": {}}


@pytest.fixture
def shards(tmp_path):
    documents = [([i + 1] * (i + 1), 2 * (i + 1)) for i in range(6)]
    splits = {"train": documents, "validation": documents[:2]}
    folder = tmp_path / "shards"
    write_shards(folder, splits, **FORMAT, tokens_per_shard=8)
    return folder


def test_shards_hold_every_document_once_with_one_end_of_text_token(shards):
    manifest = read_manifest(shards)
    stream = TokenStream.open(shards, "train", manifest)
    expected = [token for i in range(6) for token in [i + 1] * (i + 1) + [0]]
    assert stream.read(0, len(stream)).tolist() == expected
    train = manifest["sources"]["test"]["splits"]["train"]
    assert (train["documents"], train["tokens"], train["bytes"]) == (6, len(expected), 42)
    assert len(train["shards"]) > 1
    assert stream.document_starts().tolist() == [0, 2, 5, 9, 14, 20]
    assert TokenStream.open(shards, "train", manifest, source="test").num_bytes == 42
    offsets = np.fromfile(shards / "test" / "train-00000.docs", dtype="<u8")
    tokens = np.fromfile(shards / "test" / "train-00000.bin", dtype="<u2")
    assert all(offset == 0 or tokens[offset - 1] == 0 for offset in offsets)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    start=st.integers(-50, 100),
    length=st.integers(1, 60),
)
def test_the_token_stream_wraps_around_its_shards(sizes, start, length):
    tokens = np.arange(sum(sizes))
    stream = TokenStream(np.split(tokens, np.cumsum(sizes)[:-1]), num_bytes=1)
    assert stream.read(start, length).tolist() == [(start + i) % len(tokens) for i in range(length)]


def test_token_ids_take_two_bytes_if_the_vocabulary_allows():
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("<u2", "<u4")


def test_a_truncated_shard_is_named(shards):
    file = shards / "test" / "train-00000-1.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00000-1.bin has \d+ bytes, but the manifest records"):
        read_manifest(shards)


def test_a_damaged_shard_is_named(shards):
    file = shards / "test" / "train-00000.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.bin is damaged: its checksum differs"):
        verify_checksums(shards, read_manifest(shards))


def test_interrupted_writing_leaves_no_files(tmp_path):
    def documents():
        yield [1, 2, 3], 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", {"train": documents()}, **FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split_is_refused_and_leaves_no_files(tmp_path):
    with pytest.raises(UserError, match="no text is left for the validation split"):
        write_shards(tmp_path / "out", {"train": [([1], 1)], "validation": []}, **FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_prepared_shards_decode_to_the_text_and_are_kept_when_run_again(corpus, tokenizer_folder, tmp_path):
    settings = DataPrepareSettings(corpus=str(corpus), output=str(tmp_path / "data"))
    manifest = prepare(settings, tokenizer_folder, tmp_path / "data")
    tokenizer = load_tokenizer(tokenizer_folder)
    for split, documents in zip(("train", "validation"), split_documents(settings)[:2], strict=True):
        stream = TokenStream.open(tmp_path / "data", split, manifest)
        texts = tokenizer.decode(stream.read(0, len(stream))).split("<|endoftext|>")
        assert texts == [*documents, ""]
    written = (tmp_path / "data" / "corpus" / "train-00000.bin").stat().st_mtime_ns
    assert prepare(settings, tokenizer_folder, tmp_path / "data") == manifest
    assert (tmp_path / "data" / "corpus" / "train-00000.bin").stat().st_mtime_ns == written
    assert manifest["sources"]["corpus"]["splits"]["train"]["bytes"] + manifest["sources"]["corpus"]["splits"][
        "validation"
    ]["bytes"] == sum(len(document.encode()) for document in read_documents([corpus]))


def test_shards_of_other_text_are_not_overwritten(corpus, tokenizer_folder, tmp_path):
    other = tmp_path / "text.txt"
    other.write_text("Another text.\n" * 50)
    prepare(DataPrepareSettings(corpus=str(corpus)), tokenizer_folder, tmp_path / "data")
    with pytest.raises(UserError, match="holds shards with a different source and text"):
        prepare(DataPrepareSettings(corpus=str(other)), tokenizer_folder, tmp_path / "data")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").touch()
    with pytest.raises(UserError, match="holds files that are not token shards"):
        prepare(DataPrepareSettings(corpus=str(corpus)), tokenizer_folder, tmp_path / "foreign")


def test_inspect_prints_the_manifest_verifies_checksums_and_decodes_samples(corpus, tokenizer_folder, tmp_path, capsys):
    data = tmp_path / "data"
    arguments = ["--corpus", str(corpus), "--tokenizer-path", str(tokenizer_folder), "--output", str(data)]
    assert main(["data", "prepare", *arguments]) == 0
    assert main(["data", "inspect", "--path", str(data), "--tokenizer-path", str(tokenizer_folder)]) == 0
    printed = capsys.readouterr().out
    assert "checksums verified" in printed
    assert "NORTHANGER ABBEY" in printed
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert main(["data", "inspect", "--path", str(data), "--tokenizer-path", str(tokenizer_folder)]) == 2
