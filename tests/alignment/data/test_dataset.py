"""Every form of data in, one form out; what cannot be used is refused with its place, or counted."""

import json
import math

import pytest
from datasets import Dataset, DatasetDict

from scratch_gpt.alignment.data.dataset import (
    conversations,
    preference,
    prepare_dataset,
    prompt_only,
    unpaired_preference,
)
from scratch_gpt.config import RecipeSettings
from scratch_gpt.errors import UserError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """`read(reader, rows)`: what the reader makes of a file of these rows."""

    def run(reader, rows, plain_text="chat", name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return reader(RecipeSettings(plain_text=plain_text), str(path))

    return run


ANSWERED = {"prompt": [user("2 + 2?")], "completion": [assistant("4")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("2 + 2?"), assistant("4")]}, {"messages": [user("2 + 2?"), assistant("4")]}),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            {"messages": [user("2 + 2?"), assistant("4")]},
        ),
        ({"prompt": "2 + 2?", "completion": "4"}, ANSWERED),
        ({"prompt": [user("2 + 2?")], "completion": [assistant("4")]}, ANSWERED),
        ({"instruction": "2 + 2?", "output": "4"}, ANSWERED),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "messages": None}, ANSWERED),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            {"prompt": [user("Add.\n\n2, 2")], "completion": [assistant("4")]},
        ),
        ({"instruction": "2 + 2?", "input": math.nan, "response": "4"}, ANSWERED),  # as pandas leaves it open
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
            },
            {"messages": [system("Be brief."), user("2 + 2?"), assistant("4")]},
        ),
        (
            {"system": "Be brief.", "instruction": "2 + 2?", "output": "4"},
            {**ANSWERED, "prompt": [system("Be brief."), user("2 + 2?")]},
        ),
        ({"messages": [system(" "), user("2 + 2?"), assistant("4")]}, {"messages": [user("2 + 2?"), assistant("4")]}),
    ],
)
def test_conversations(read, row, expected):
    assert read(conversations, [row]).rows == [expected]


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
def test_pairs_and_feedback_from_them(read, row):
    assert read(preference, [row]).rows == [PAIR]
    good, bad = read(unpaired_preference, [row]).rows
    assert (good["completion"], good["label"], bad["completion"], bad["label"]) == (
        PAIR["chosen"],
        True,
        PAIR["rejected"],
        False,
    )


def test_pairs_of_plain_texts_part_at_a_word(read):
    """Not within one, though both sides begin it alike; and the white space goes to the answers, where tokens have it."""
    row = {"chosen": "It was the best of times", "rejected": "It was the beginning"}
    pair = {"prompt": "It was the", "chosen": " best of times", "rejected": " beginning"}
    assert read(preference, [row], plain_text="continue").rows == [pair]


def test_conversations_stay_conversations_where_texts_go_on(read):
    """Alpaca's rows are questions and answers whatever --plain-text says, and so is what holds messages at one side."""
    for row in ({"instruction": "2 + 2?", "output": "4"}, {"prompt": [user("2 + 2?")], "completion": "4"}):
        assert read(conversations, [row], plain_text="continue").rows == [ANSWERED]


def test_feedback_and_prompts(read):
    row = {"prompt": "2 + 2?", "completion": "5", "label": False}
    assert read(unpaired_preference, [row]).rows == [
        {"prompt": [user("2 + 2?")], "completion": [assistant("5")], "label": False}
    ]
    assert read(prompt_only, [{"prompt": "2 + 2?", "answer": 4}]).rows == [{"prompt": [user("2 + 2?")], "answer": 4}]
    assert read(prompt_only, [{"messages": [user("a"), assistant("b")]}]).rows[0]["prompt"] == [user("a")]
    assert read(prompt_only, [{"prompt": "It was"}], plain_text="continue").rows == [{"prompt": "It was"}]
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": 1}
    assert read(prompt_only, [talk]).rows[0]["prompt"] == [user("a")]
    assert read(unpaired_preference, [talk]).rows == [
        {"prompt": [user("a")], "completion": [assistant("b")], "label": True}
    ]


def test_files_of_every_kind_and_folders(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    dataset = Dataset.from_list(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    found = [
        conversations(RecipeSettings(), str(tmp_path / name)).rows
        for name in ("a.json", "lines.json", "a.parquet", "folder", "splits")
    ]
    assert all(one == found[0] for one in found) and len(found[0]) == 3
    assert len(conversations(RecipeSettings(split="test"), str(tmp_path / "splits")).rows) == 1
    with pytest.raises(UserError, match="has no split 'other', but train, test"):
        conversations(RecipeSettings(split="other"), str(tmp_path / "splits"))


def test_rows_that_teach_nothing_are_left_out_and_counted(read):
    told = read(conversations, [{"prompt": "a", "completion": " "}, {"prompt": "", "completion": "b"}, ANSWERED])
    assert len(told.rows) == 1
    assert told.describe() == "1 rows; left out: 1 with an empty answer, 1 with an empty prompt"
    told = read(preference, [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"chosen": "a", "rejected": "b"}, PAIR])
    assert told.left_out == {"with two equal sides": 1, "with two sides that do not begin alike": 1}
    told = read(conversations, [{"prompt": "a", "completion": [assistant("b"), user("c"), assistant("d")]}, ANSWERED])
    assert told.left_out == {"whose answer is more than one turn": 1}
    with pytest.raises(UserError, match="holds nothing to learn from: 1 with two equal sides"):
        read(preference, [{"prompt": "a", "chosen": "b", "rejected": "b"}])


@pytest.mark.parametrize(
    ("reader", "rows", "message"),
    [
        (conversations, [{"text": "a", "title": "b"}], "row 1: its columns are text, title, but this stage takes mess"),
        (
            preference,
            [PAIR, {"prompt": "a", "chosen": "b"}],
            "row 2: its columns are prompt, chosen, but this stage takes",
        ),
        (preference, [{"chosen": 1, "rejected": 2}], "row 1: a int where messages belong"),
        (conversations, [{"prompt": "a", "completion": "b", "label": False}], "would imitate the bad ones too"),
        (conversations, [{"messages": [user("a"), {**assistant("b"), "tool_calls": [1]}]}], "a message calls tools"),
        (conversations, [{"messages": [user("a"), assistant("b")], "tools": [{}]}], "the column tools is not empty"),
        (conversations, [{"prompt": "a", "completion": math.nan}], "row 1: a float where messages belong"),
        (
            conversations,
            [{"system": "a", "messages": [system("b"), user("c"), assistant("d")]}],
            "of the system as well",
        ),
        (prompt_only, [{"prompt": [user("a"), assistant("b")]}], "a prompt ends with a turn of the assistant"),
        (unpaired_preference, [{"prompt": "a", "completion": "b", "label": math.nan}], "label is nan"),
        (
            conversations,
            [{"messages": [{"role": "robot", "content": "a"}]}],
            "has the role 'robot': the roles are system",
        ),
        (conversations, [{"messages": "hello"}], "a str where messages belong"),
        (conversations, [{"messages": [{"content": "a"}]}], "needs role and content"),
        (
            unpaired_preference,
            [{"prompt": "a", "completion": "b", "label": 3}],
            "label is 3: give true for a good completion",
        ),
        (prompt_only, [{"text": "a"}], "but this stage takes prompt; instruction"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(read, reader, rows, message):
    with pytest.raises(UserError, match=message):
        read(reader, rows)


def test_broken_lines_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not JSON"):
        conversations(RecipeSettings(), str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"b.jsonl, line 2: not UTF-8"):
        conversations(RecipeSettings(), str(tmp_path / "b.jsonl"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"c.parquet: damaged"):
        conversations(RecipeSettings(), str(tmp_path / "c.parquet"))
    with pytest.raises(UserError, match=r"there is no file nowhere.jsonl"):
        conversations(RecipeSettings(), "nowhere.jsonl")


def test_held_out_rows_are_drawn_by_the_seed_and_a_prompt_is_in_one_part_only(read, tmp_path, capsys):
    rows = [{"prompt": f"q{i % 20}", "completion": f"a{i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def split(seed, **more):
        settings = RecipeSettings(data=str(tmp_path / "rows.jsonl"), seed=seed, validation_fraction=0.1, **more)
        return prepare_dataset(settings, conversations, lambda row: (row, len(row["completion"][0]["content"])), 3)

    one, same, other = split(1), split(1), split(2)
    assert one.validation == same.validation != other.validation
    asked = [{row["prompt"][0]["content"] for row in part} for part in (one.train, one.validation)]
    assert not asked[0] & asked[1] and len(asked[1]) == 2 and len(one.train) + len(one.validation) == 60
    short = prepare_dataset(
        RecipeSettings(data=str(tmp_path / "rows.jsonl"), validation_data=str(tmp_path / "rows.jsonl")),
        conversations,
        lambda row: (row, len(row["completion"][0]["content"])),
        2,
    )
    assert len(short.train) == 10 and "10 rows; left out: 50 longer than 2 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row is left of"):
        prepare_dataset(RecipeSettings(data=str(tmp_path / "rows.jsonl")), conversations, lambda row: (row, 9), 3)
    with pytest.raises(UserError, match="of 20 prompts that holds out 0"):
        prepare_dataset(
            RecipeSettings(data=str(tmp_path / "rows.jsonl"), validation_fraction=0.001),
            conversations,
            lambda row: (row, 1),
            3,
        )


def test_the_bundled_data_suits_every_stage():
    settings = RecipeSettings()
    assert len(conversations(settings, "bundled").rows) == len(preference(settings, "bundled").rows) > 1000
    first = preference(settings, "bundled").rows[0]
    assert first["prompt"][0]["role"] == "user" and first["chosen"] != first["rejected"]
    assert unpaired_preference(settings, "bundled").rows[0]["label"] is True
    assert prompt_only(settings, "bundled").rows[0]["prompt"] == first["prompt"]
