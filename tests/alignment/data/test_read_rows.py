"""Rows of files of every format, of saved datasets and their splits; malformed files are refused with the line."""

import json

import pytest
from datasets import Dataset, DatasetDict

from scratch_gpt.alignment.data.read_rows import read_rows
from scratch_gpt.errors import UserError


def test_files_of_every_format_and_saved_datasets(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    dataset = Dataset.from_list(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("a.json", "lines.json", "a.parquet", "folder", "splits"):
        assert read_rows(str(tmp_path / name), "train") == rows, name
    assert read_rows(str(tmp_path / "splits"), "test") == rows[:1]
    with pytest.raises(UserError, match="has no split 'other', but train, test"):
        read_rows(str(tmp_path / "splits"), "other")


def test_malformed_lines_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not JSON"):
        read_rows(str(tmp_path / "a.jsonl"), "train")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"b.jsonl, line 2: not UTF-8"):
        read_rows(str(tmp_path / "b.jsonl"), "train")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"c.parquet: damaged"):
        read_rows(str(tmp_path / "c.parquet"), "train")
    with pytest.raises(UserError, match=r"there is no file nowhere.jsonl"):
        read_rows("nowhere.jsonl", "train")
