import pytest

from scratch_gpt.cli import main


@pytest.fixture(scope="session")
def shards(corpus, tokenizer_folder, tmp_path_factory):
    """Folders of a tokenizer and of token shards, shared by all runs."""
    data = tmp_path_factory.mktemp("shards") / "data"
    prepare = ["data", "prepare", "--corpus", str(corpus), "--tokenizer-path", str(tokenizer_folder)]
    assert main([*prepare, "--output", str(data), "--workers", "1"]) == 0
    return tokenizer_folder, data
