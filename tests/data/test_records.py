"""Every kind of file and dataset gives the same documents, at once or in slices; broken records are named."""

import gzip
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.data.inputs import Dataset, FileSlice, cut
from scratch_gpt.data.records import ReadOptions, read_slice
from scratch_gpt.data.sources import read_locations
from scratch_gpt.errors import UserError

DOCUMENTS = [f"Document {i}: été 👩🏽‍🚀\n" + "words and\r\nmore words " * (i % 7) + "." for i in range(300)]
TEXT = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
JSONL = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def table() -> pa.Table:
    return pa.table({"n": list(range(len(DOCUMENTS))), "text": DOCUMENTS})


def write(path: Path) -> Path:
    plain = TEXT if ".txt" in path.name else JSONL
    if path.suffix in (".txt", ".jsonl"):
        path.write_bytes(plain)
    elif path.suffix == ".gz":
        path.write_bytes(
            gzip.compress(plain[:999]) + gzip.compress(plain[999:])
        )  # two gzip members, as `cat a.gz b.gz` writes
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(plain))
    elif path.suffix == ".zst":
        path.write_bytes(zstd(plain))
    elif path.suffix == ".parquet":
        pq.write_table(table(), path, row_group_size=50)
    else:
        make = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
        with make(path, table().schema) as writer:
            writer.write_table(table(), max_chunksize=70)
    return path


FILES = ["a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"]
FILES += ["a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [10**9, 1500])
def test_every_format_gives_every_document_once_in_order(name, size, tmp_path):
    path = write(tmp_path / name)
    slices = [file_slice for file_slice, _ in cut(path, size)]
    if size == 1500 and name in ("a.txt", "a.jsonl", "a.parquet"):
        assert len(slices) > 3
    assert [text for file_slice in slices for text in read_slice(file_slice, ReadOptions(), Counter())] == DOCUMENTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "saved splits", "files"])
def test_datasets_give_every_document_once_in_order(kind, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    dataset = datasets.Dataset(table())
    if kind == "saved":
        dataset.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict(train=dataset, test=dataset.select(range(3))).save_to_disk(folder)
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_bytes(JSONL)
    location = Dataset(str(folder), streaming=streaming)
    slices = [file_slice for file_slice, _ in cut(location, 5000)]
    assert len(slices) > 1 or (kind == "files" and streaming)
    assert [text for file_slice in slices for text in read_slice(file_slice, ReadOptions(), Counter())] == DOCUMENTS
    assert list(read_locations([location], ReadOptions())) == DOCUMENTS
    with pytest.raises(UserError, match="there is no column 'body'; the columns are (n, text|text, n)"):
        list(read_locations([location], ReadOptions(column="body")))


def test_a_missing_dataset_or_split_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="the dataset nobody/nothing cannot be loaded"):
        list(read_locations([Dataset("nobody/nothing")], ReadOptions()))
    datasets.DatasetDict(test=datasets.Dataset(table())).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match="has no split 'train'; it has test"):
        list(read_locations([Dataset(str(tmp_path / "data"))], ReadOptions()))


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.text("ab \n<|endoftext|>é", max_size=30), max_size=12),
    size=st.integers(1, 60),
    ending=st.sampled_from(["", "\n"]),
)
def test_slices_of_a_text_file_hold_the_same_documents_as_the_file(documents, size, ending, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "slices.txt"
    path.write_text("\n<|endoftext|>\n".join(documents) + ending, encoding="utf-8")
    expected = list(read_slice(FileSlice(path), ReadOptions(), Counter()))
    slices = [file_slice for file_slice, _ in cut(path, size)]
    assert [text for file_slice in slices for text in read_slice(file_slice, ReadOptions(), Counter())] == expected
    assert [file_slice.start for file_slice in slices[1:]] == [file_slice.end for file_slice in slices[:-1]]


def test_a_template_composes_the_text_from_several_columns(tmp_path):
    rows = [{"title": "T", "text": "x", "meta": {"year": 1813}}, {"title": None, "text": "y", "meta": {"year": 1}}]
    read_options = ReadOptions(template="{title} ({meta[year]}): {text}")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_locations([tmp_path / name], read_options)) == ["T (1813): x", " (1): y"]


BROKEN = [
    (b'{"text": "good"}\n{"text": \n', r"a.jsonl, line 2: not JSON: Expecting value"),
    (b'{"text": "good"}\n\n[1, 2]\n', r"a.jsonl, line 3: expected a JSON object, not '\[1, 2\]'"),
    (b'{"text": "good"}\n{"body": "b", "id": 1}\n', r"line 2: there is no column 'text'; the columns are body, id"),
    (b'{"text": "good"}\n{"text": 7}\n', r"line 2: the column 'text' holds int, not text"),
    (b'{"text": "good"}\n{"text": "caf\xe9"}\n', r"line 2: not UTF-8 at byte 13 of the line \(0xe9\)"),
    (b'{"text": "good"}\n{"text": "a\\u0000b"}\n', r"line 2: a NUL byte after 'a'"),
    (b'{"text": "good"}\n{"text": "a\\ud83d"}\n', r"line 2: U\+D83D is an unpaired surrogate"),
    (b'{"text": "good"}\n' + b"[" * 200_000 + b"\n", r"line 2: not JSON"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_broken_line_is_named_or_skipped_and_counted(content, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message + r"[\s\S]*--on-bad-record skip"):
        list(read_locations([path], ReadOptions(on_bad_record="stop")))
    removed = Counter()
    assert list(read_slice(FileSlice(path), ReadOptions(on_bad_record="skip"), removed)) == ["good"]
    assert removed == {"broken": 1}


def test_line_numbers_count_from_the_beginning_of_the_file_in_every_slice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL + b"{]\n")
    *_, (last, _) = cut(path, 1000)
    assert last.start > 0
    with pytest.raises(UserError, match=f"line {len(DOCUMENTS) + 1}: not JSON"):
        list(read_slice(last, ReadOptions(), Counter()))


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 a\0b\n<|endoftext|>\ngood")
    assert list(read_locations([path], ReadOptions(errors="replace"))) == ["caf\ufffd a\ufffdb", "good"]
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        list(read_locations([path], ReadOptions()))
    path.write_bytes(b"a\0b\n<|endoftext|>\ngood")
    with pytest.raises(UserError, match="a NUL byte after 'a'"):
        list(read_locations([path], ReadOptions()))
    removed = Counter()
    assert list(read_slice(FileSlice(path), ReadOptions(on_bad_record="skip"), removed)) == ["good"]
    assert removed["broken"] == 1


def test_empty_documents_are_skipped_and_counted(tmp_path):
    pq.write_table(pa.table({"text": ["a", "", None, " \n", "b"]}), tmp_path / "a.parquet")
    removed = Counter()
    assert list(read_slice(FileSlice(tmp_path / "a.parquet"), ReadOptions(), removed)) == ["a", "b"]
    assert removed == {"empty": 3}


def test_a_parquet_string_that_is_not_utf8_is_named_with_its_row(tmp_path):
    strings = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\10\0\0\0"), pa.py_buffer(b"goodcaf\xe9")]
    )
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet, row 2: not UTF-8 at byte 3"):
        list(read_locations([tmp_path / "a.parquet"], ReadOptions()))
    assert list(read_locations([tmp_path / "a.parquet"], ReadOptions(on_bad_record="skip"))) == ["good"]


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith((".txt", ".jsonl"))])
def test_a_truncated_or_foreign_file_is_named(name, tmp_path):
    path = write(tmp_path / name)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        list(read_locations([path], ReadOptions()))
    path.write_bytes(b"something else altogether")
    with pytest.raises(UserError, match=f"{name}: damaged"):
        list(read_locations([path], ReadOptions()))
