"""Held-out rows are chosen by the seed, prompt by prompt; rows that are too long are skipped and counted."""

import json

import pytest

from scratch_gpt.alignment.data.dataset import prepare_dataset
from scratch_gpt.alignment.data.dataset_types import prompt_completion
from scratch_gpt.config import RecipeSettings
from scratch_gpt.errors import UserError


@pytest.fixture
def rows(tmp_path):
    """The path of a file of 60 rows with 20 prompts; 10 of the completions have 2 characters, 50 have 3."""
    rows = [{"prompt": f"q{i % 20}", "completion": f"a{i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def count_characters(row):
    return row, len(row["completion"][0]["content"])


def test_held_out_prompts_are_chosen_by_the_seed_and_not_trained_on(rows):
    def split(seed):
        settings = RecipeSettings(data=rows, seed=seed, validation_fraction=0.1)
        return prepare_dataset(settings, prompt_completion, count_characters, 3)

    one, same, other = split(1), split(1), split(2)
    assert one.validation == same.validation != other.validation
    trained, held_out = ({row["prompt"][0]["content"] for row in part} for part in (one.train, one.validation))
    assert not trained & held_out and len(held_out) == 2 and len(one.train) + len(one.validation) == 60
    with pytest.raises(UserError, match="--validation-fraction 0.001 holds out 0 of 20 prompts"):
        prepare_dataset(RecipeSettings(data=rows, validation_fraction=0.001), prompt_completion, count_characters, 3)


def test_rows_that_are_too_long_are_skipped_and_counted(rows, capsys):
    settings = RecipeSettings(data=rows, validation_data=rows)
    assert len(prepare_dataset(settings, prompt_completion, count_characters, 2).train) == 10
    assert "10 rows; skipped: 50 longer than 2 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row is left of"):
        prepare_dataset(RecipeSettings(data=rows), prompt_completion, lambda row: (row, 9), 3)
