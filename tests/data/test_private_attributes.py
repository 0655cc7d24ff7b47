"""Private attributes of other libraries that the data package relies on, for the pinned versions."""

from datasets import Dataset, load_from_disk


def test_the_fingerprint_of_a_dataset_identifies_its_content(tmp_path):
    """`data/sources.py` identifies a dataset by it; another identity would make prepared shards look foreign."""
    for name, texts in (("one", ["a", "b"]), ("other", ["a", "c"])):
        Dataset.from_list([{"text": text} for text in texts]).save_to_disk(tmp_path / name)
    one, again, other = (load_from_disk(tmp_path / name)._fingerprint for name in ("one", "one", "other"))
    assert isinstance(one, str) and one == again != other
