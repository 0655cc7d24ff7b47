"""Finding text, reading documents, and splitting off held-out text."""

import pytest

from scratch_gpt.config import TextSettings
from scratch_gpt.data.sources import (
    bundled_corpus,
    document_digest,
    find_files,
    is_held_out,
    read_documents,
    split_documents,
)
from scratch_gpt.errors import UserError


def test_the_bundled_corpus_is_three_novels_with_their_ends_held_out():
    for split, size in (("train", 1_666_763), ("valid", 115_823)):
        assert bundled_corpus(split).stat().st_size == size
        assert len(list(read_documents([bundled_corpus(split)]))) == 3


def test_documents_end_at_separator_lines_and_at_the_end_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n<|endoftext|>\n\n  \n<|endoftext|>\nthree <|endoftext|> four")
    (tmp_path / "b.txt").write_text("five\n")
    assert list(read_documents(find_files(str(tmp_path)))) == ["one\ntwo", "three <|endoftext|> four", "five"]


def test_a_byte_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("été\n".encode() * 3 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8 at byte 21 \(0xe9\).*--encoding-errors replace"):
        list(read_documents([file]))
    assert list(read_documents([file], errors="replace")) == ["été\n" * 3 + "caf\ufffd"]


@pytest.mark.parametrize(("name", "message"), [("absent.txt", "there is no text file"), ("empty.txt", "empty")])
def test_a_missing_or_empty_corpus_is_refused(tmp_path, name, message):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path / name))


def test_a_folder_without_text_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .txt file"):
        find_files(str(tmp_path))


def test_a_glob_finds_files_in_sorted_order(tmp_path):
    for name in ("b.md", "a.md", "c.txt"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_files(str(tmp_path / "*.md"))] == ["a.md", "b.md"]


def test_the_split_by_document_is_a_partition_and_stable_when_text_is_added(tmp_path):
    documents = [f"document number {i}" for i in range(400)]
    splits = []
    for count in (300, 400):
        file = tmp_path / f"{count}.txt"
        file.write_text("\n<|endoftext|>\n".join(documents[:count]))
        train, valid, _ = split_documents(TextSettings(corpus=str(file), validation_fraction=0.1))
        assert sorted([*train, *valid]) == sorted(documents[:count])
        splits.append(set(valid))
    assert splits[0] <= splits[1]
    assert 0.05 < len(splits[1]) / 400 < 0.2
    assert splits[1] == {document for document in documents if is_held_out(document_digest(document), 0.1)}


def test_with_few_documents_the_end_of_each_is_held_out(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(1000))
    file = tmp_path / "one.txt"
    file.write_text(lines)
    train, valid, _ = split_documents(TextSettings(corpus=str(file)))
    [head], [tail] = train, valid
    assert head + tail == lines.rstrip("\n")
    assert head.endswith("\n")
    assert 0.04 < len(tail) / len(lines) < 0.06


def test_a_separate_validation_text_is_used(tmp_path):
    (tmp_path / "train.txt").write_text("a\n<|endoftext|>\nb")
    (tmp_path / "valid.txt").write_text("c")
    settings = TextSettings(corpus=str(tmp_path / "train.txt"), validation_corpus=str(tmp_path / "valid.txt"))
    train, valid, _ = split_documents(settings)
    assert (list(train), list(valid)) == (["a", "b"], ["c"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_an_invalid_validation_fraction_is_refused(tmp_path, fraction):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match="must be between 0 and 1"):
        split_documents(TextSettings(corpus=str(tmp_path / "text.txt"), validation_fraction=fraction))
