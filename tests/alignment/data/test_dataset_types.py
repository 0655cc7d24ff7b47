"""Rows of all usual columns become one of TRL's dataset types; unusable rows are counted, or refused with their number."""

import json
import math

import pytest

from scratch_gpt.alignment.data.dataset_types import preference, prompt_completion, prompt_only, unpaired_preference
from scratch_gpt.errors import UserError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """`read(dataset_type, rows)` writes the rows to a file and reads it as this type."""

    def run(dataset_type, rows, plain_text="chat"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dataset_type(str(path), plain_text=plain_text)

    return run


ROW = {"prompt": [user("2 + 2?")], "completion": [assistant("4")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("2 + 2?"), assistant("4")]}, {"messages": [user("2 + 2?"), assistant("4")]}),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            {"messages": [user("2 + 2?"), assistant("4")]},
        ),
        ({"prompt": "2 + 2?", "completion": "4"}, ROW),
        ({"prompt": [user("2 + 2?")], "completion": [assistant("4")]}, ROW),
        ({"instruction": "2 + 2?", "output": "4"}, ROW),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "messages": None}, ROW),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            {"prompt": [user("Add.\n\n2, 2")], "completion": [assistant("4")]},
        ),
        ({"instruction": "2 + 2?", "input": math.nan, "response": "4"}, ROW),  # as pandas leaves it open
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
            },
            {"messages": [system("Be brief."), user("2 + 2?"), assistant("4")]},
        ),
        (
            {"system": "Be brief.", "instruction": "2 + 2?", "output": "4"},
            {**ROW, "prompt": [system("Be brief."), user("2 + 2?")]},
        ),
        ({"messages": [system(" "), user("2 + 2?"), assistant("4")]}, {"messages": [user("2 + 2?"), assistant("4")]}),
    ],
)
def test_prompt_completion(read, row, expected):
    assert read(prompt_completion, [row]).rows == [expected]


PAIR = {"prompt": [user("2 + 2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        PAIR,
        {"chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {"instruction": "2 + 2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 2?", "chosen": [user("2 + 2?"), assistant("4")], "rejected": [user("2 + 2?"), assistant("5")]},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": "5",
        },
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"},
    ],
)
def test_preference_pairs_and_unpaired_completions_from_them(read, row):
    assert read(preference, [row]).rows == [PAIR]
    chosen, rejected = read(unpaired_preference, [row]).rows
    assert (chosen["completion"], chosen["label"]) == (PAIR["chosen"], True)
    assert (rejected["completion"], rejected["label"]) == (PAIR["rejected"], False)


def test_the_prompt_of_two_texts_ends_before_a_word(read):
    """Although both begin that word alike. Its white space goes to the completions, as it does in tokens."""
    row = {"chosen": "It was the best of times", "rejected": "It was the beginning"}
    pair = {"prompt": "It was the", "chosen": " best of times", "rejected": " beginning"}
    assert read(preference, [row], plain_text="continue").rows == [pair]


def test_conversations_stay_conversations_with_plain_text_continue(read):
    """Alpaca's rows and rows with messages in a column are conversations, whatever --plain-text says."""
    for row in ({"instruction": "2 + 2?", "output": "4"}, {"prompt": [user("2 + 2?")], "completion": "4"}):
        assert read(prompt_completion, [row], plain_text="continue").rows == [ROW]


def test_unpaired_preference_and_prompt_only(read):
    row = {"prompt": "2 + 2?", "completion": "5", "label": False}
    assert read(unpaired_preference, [row]).rows == [
        {"prompt": [user("2 + 2?")], "completion": [assistant("5")], "label": False}
    ]
    assert read(prompt_only, [{"prompt": "2 + 2?", "answer": 4}]).rows == [{"prompt": [user("2 + 2?")], "answer": 4}]
    assert read(prompt_only, [{"messages": [user("a"), assistant("b")]}]).rows[0]["prompt"] == [user("a")]
    assert read(prompt_only, [{"prompt": "It was"}], plain_text="continue").rows == [{"prompt": "It was"}]
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": 1}
    assert read(prompt_only, [row]).rows[0]["prompt"] == [user("a")]
    assert read(unpaired_preference, [row]).rows == [
        {"prompt": [user("a")], "completion": [assistant("b")], "label": True}
    ]


def test_unusable_rows_are_skipped_and_counted(read):
    data = read(prompt_completion, [{"prompt": "a", "completion": " "}, {"prompt": "", "completion": "b"}, ROW])
    assert len(data.rows) == 1
    assert data.describe() == "1 rows; skipped: 1 with an empty completion, 1 with an empty prompt"
    data = read(preference, [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"chosen": "a", "rejected": "b"}, PAIR])
    assert data.skipped == {"with two equal sides": 1, "with two sides that do not begin alike": 1}
    data = read(prompt_completion, [{"prompt": "a", "completion": [assistant("b"), user("c"), assistant("d")]}, ROW])
    assert data.skipped == {"with a completion of several messages": 1}
    with pytest.raises(UserError, match="has no usable rows: 1 with two equal sides"):
        read(preference, [{"prompt": "a", "chosen": "b", "rejected": "b"}])


@pytest.mark.parametrize(
    ("dataset_type", "rows", "message"),
    [
        (
            prompt_completion,
            [{"text": "a", "title": "b"}],
            "row 1: its columns are text, title, but this command takes mess",
        ),
        (
            preference,
            [PAIR, {"prompt": "a", "chosen": "b"}],
            "row 2: its columns are prompt, chosen, but this command takes",
        ),
        (preference, [{"chosen": 1, "rejected": 2}], "row 1: a int instead of messages"),
        (prompt_completion, [{"prompt": "a", "completion": "b", "label": False}], "would learn the bad ones, too"),
        (
            prompt_completion,
            [{"messages": [user("a"), {**assistant("b"), "tool_calls": [1]}]}],
            "a message calls tools",
        ),
        (
            prompt_completion,
            [{"messages": [user("a"), assistant("b")], "tools": [{}]}],
            "the column tools is not supported, and not empty",
        ),
        (prompt_completion, [{"prompt": "a", "completion": math.nan}], "row 1: a float instead of messages"),
        (
            prompt_completion,
            [{"system": "a", "messages": [system("b"), user("c"), assistant("d")]}],
            "its first message is a system message, too",
        ),
        (prompt_only, [{"prompt": [user("a"), assistant("b")]}], "a prompt ends with a message of the assistant"),
        (unpaired_preference, [{"prompt": "a", "completion": "b", "label": math.nan}], "label is nan"),
        (
            prompt_completion,
            [{"messages": [{"role": "robot", "content": "a"}]}],
            "has the role 'robot': the roles are system",
        ),
        (prompt_completion, [{"messages": "hello"}], "a str instead of messages"),
        (prompt_completion, [{"messages": [{"content": "a"}]}], "needs role and content"),
        (
            unpaired_preference,
            [{"prompt": "a", "completion": "b", "label": 3}],
            "label is 3: give true for a desirable completion",
        ),
        (prompt_only, [{"text": "a"}], "but this command takes prompt; instruction"),
    ],
)
def test_malformed_rows_are_refused_with_their_number(read, dataset_type, rows, message):
    with pytest.raises(UserError, match=message):
        read(dataset_type, rows)


def test_the_demonstration_data_has_every_type():
    pairs = preference("bundled").rows
    assert len(prompt_completion("bundled").rows) == len(pairs) > 1000
    assert pairs[0]["prompt"][0]["role"] == "user" and pairs[0]["chosen"] != pairs[0]["rejected"]
    assert unpaired_preference("bundled").rows[0]["label"] is True
    assert prompt_only("bundled").rows[0]["prompt"] == pairs[0]["prompt"]
