"""Deduplication and decontamination, against direct comparisons."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scratch_gpt.data.dedup import Contamination, evaluation_texts, first_occurrences

LINE = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4))
def test_exactly_the_first_occurrence_of_each_digest_is_kept(lists):
    keep = first_occurrences([np.array(one, dtype=np.uint64) for one in lists])
    seen, expected = set(), []
    for one in lists:
        expected.append([value not in seen and not seen.add(value) for value in one])
    assert [kept.tolist() for kept in keep] == expected


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ("Before. " + LINE + " after.", True),
        (LINE.upper().replace(" ", " -- "), True),
        (" ".join(LINE.split()[2:15]), True),
        (" ".join(LINE.split()[2:14]), False),
        (LINE.replace("universally", "generally").replace("possession", "want"), False),
        ("", False),
    ],
)
def test_thirteen_consecutive_shared_words_are_contamination(document, found):
    assert Contamination([LINE, "too short to matter"]).found_in(document) is found


@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=60))
def test_contamination_equals_a_comparison_of_all_ngrams(evaluation, document):
    def ngrams(words):
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    expected = bool(ngrams(evaluation) & ngrams(document))
    assert Contamination([" ".join(evaluation)]).found_in(" ".join(document)) == expected


def test_every_string_of_a_record_is_evaluation_text(tmp_path):
    record = {"query": "a", "choices": ["b", {"text": "c"}], "gold": 1}
    (tmp_path / "eval.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "eval.txt").write_text("d\n<|endoftext|>\ne")
    files = [str(tmp_path / "eval.jsonl"), str(tmp_path / "eval.txt")]
    assert list(evaluation_texts(files)) == ["a", "b", "c", "d", "e"]
