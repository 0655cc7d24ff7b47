"""The data of every stage: whatever its columns are called, one form.

| columns | what it is |
|---|---|
| `messages` | a conversation: a list of {role, content} |
| `conversations` | the same as ShareGPT has it: a list of {from, value} |
| `prompt`, `completion` (or `response`) | texts or messages |
| `instruction`, `output`, perhaps `input` | Alpaca: a question, what it is about, the answer |
| `prompt`, `chosen`, `rejected` | a pair; without `prompt` both sides are whole conversations or texts that begin alike |
| `instruction` or `conversations`, `chosen`, `rejected` | a pair, as Alpaca and ShareGPT |
| any with an answer, and `label` | an answer, and whether it is good |
| `prompt` | only what is asked; or `instruction`, or a conversation up to its last answer |

Perhaps with `system`, which begins the conversation. From here on every row has `prompt` and what belongs to it, each as
messages, or as text where plain texts are to be continued rather than answered.
"""

import itertools
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import DatasetDict, load_dataset, load_from_disk

from scratch_gpt.alignment.data import demo as bundled
from scratch_gpt.config import RecipeSettings
from scratch_gpt.console import print0
from scratch_gpt.data.inputs import damaged_arrow
from scratch_gpt.errors import UserError

Row = dict[str, Any]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""What turns are called, here and in ShareGPT."""
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
KINDS = {
    "conversations": "messages; conversations (ShareGPT); prompt, completion (or chosen); instruction, output (Alpaca)",
    "pairs": "prompt, chosen, rejected; chosen, rejected (whole conversations); instruction, chosen, rejected",
    "feedback": "prompt, completion, label; or pairs: prompt, chosen, rejected",
    "prompts": "prompt; instruction; messages; conversations",
}
"""Which columns each kind of data may have."""
UNKNOWN_TO_US = ("tools", "history", "image", "images", "video", "videos", "audio", "audios")
"""Columns that other programs would make a part of the conversation."""


@dataclass(frozen=True)
class FilteredRows:
    """Rows, and how many were left out for which reason."""

    rows: list[Row]
    left_out: dict[str, int]

    def describe(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.items())
        return f"{len(self.rows):,} rows" + (f"; left out: {reasons}" if reasons else "")


# ------------------------------------------------------------------------------------------------ reading


def read_rows(name: str, split: str) -> list[Row]:
    """All rows of a file, of a folder that `datasets` saved, of a dataset of the Hub, or the bundled ones.

    Raises:
        UserError: there is none, or a line of it is broken; the message says where.
    """
    if name == bundled.NAME:
        return bundled.bundled_rows()
    path = Path(name)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        try:
            loaded = load_from_disk(name)
        except FileNotFoundError as error:
            raise UserError(f"{name} is a folder that `datasets` did not save: give one of its files") from error
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise UserError(f"{name} has no split {split!r}, but {', '.join(loaded)}")
            loaded = loaded[split]
        return loaded.to_list()
    if path.suffix in READERS or name.count("/") != 1:
        raise UserError(f"there is no file {name}: give .jsonl, .json or .parquet, or the name of a dataset on the Hub")
    try:
        return load_dataset(name, split=split).to_list()
    except Exception as error:  # the Hub's errors are many
        raise UserError(f"there is no file {name}, and as a dataset of the Hub it cannot be had: {error}") from error


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        with damaged_arrow(path):
            return pq.read_table(path).to_pylist()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 at byte {error.start} of the file") from error
    if path.suffix != ".json":
        return list(_read_lines(path, text))
    try:
        rows = json.loads(text)
    except ValueError:  # JSON Lines, whatever its name
        return list(_read_lines(path, text))
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number}: a {type(row).__name__}, not an object")
    return rows


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a {type(row).__name__}, not an object")
        yield row


@dataclass(frozen=True)
class PreparedDataset:
    """Encoded rows to learn from and to validate on."""

    train: list[Row]
    validation: list[Row]
    chat: bool
    """Whether they are conversations, or plain texts that go on."""
    facts: dict[str, Any]
    """For the card: where they are from, and what was left out."""


def prepare_dataset(
    settings: RecipeSettings,
    read: Callable[[RecipeSettings, str], FilteredRows],
    encode: Callable[[Row], tuple[Row, int]],
    longest: int,
) -> PreparedDataset:
    """What ``read`` finds, encoded a row at a time, without the rows that are longer than ``longest`` tokens; says so.

    ``encode`` gives an encoded row and how many tokens it takes. Rows to validate on are drawn by the seed, where they have
    no place of their own.

    Raises:
        UserError: nothing is left to learn from, or to validate on.
    """
    told = read(settings, settings.data)
    print0(f"data       {settings.data}: {told.describe()}")
    facts: dict[str, Any] = {"data": f"`{settings.data}`, {told.describe()}"}
    if settings.validation_data is not None:
        parts = {"training": told.rows, "held out": read(settings, settings.validation_data).rows}
        facts["held out from"] = f"`{settings.validation_data}`"
    else:
        parts = _drawn(settings, told.rows)
    encoded: dict[str, list[Row]] = {}
    for name, rows in parts.items():
        both = [encode(row) for row in rows]
        fitting = [row for row, length in both if length <= longest]
        if not fitting:
            raise UserError(
                f"{settings.data}, {name}: no row is left of {len(rows):,}, all are longer than {longest:,} tokens"
            )
        too_long = {f"longer than {longest:,} tokens": len(rows) - len(fitting)} if len(fitting) < len(rows) else {}
        facts[name] = FilteredRows(fitting, too_long).describe()
        print0(f"           {name}: {facts[name]}")
        encoded[name] = fitting
    chat = not isinstance(told.rows[0].get("prompt"), str)
    return PreparedDataset(encoded["training"], encoded["held out"], chat, facts)


def _drawn(settings: RecipeSettings, rows: list[Row]) -> dict[str, list[Row]]:
    """``rows`` in two parts. Rows of the same prompt are in the same one."""
    asked = [json.dumps(row.get("prompt", row.get("messages"))) for row in rows]
    prompts = list(dict.fromkeys(asked))
    number = round(settings.validation_fraction * len(prompts))
    if not 0 < number < len(prompts):
        raise UserError(
            f"--validation-fraction is {settings.validation_fraction}: of {len(prompts)} prompts that holds out {number}, so "
            "give more rows or --validation-data"
        )
    chosen = set(random.Random(settings.seed).sample(prompts, number))
    return {
        "training": [row for row, prompt in zip(rows, asked, strict=True) if prompt not in chosen],
        "held out": [row for row, prompt in zip(rows, asked, strict=True) if prompt in chosen],
    }


# ------------------------------------------------------------------------------------------------ one form


def conversations(settings: RecipeSettings, name: str) -> FilteredRows:
    """Rows with `prompt` and `completion`, or with `messages` where all the assistant's turns are learnt from."""
    return _read_filtered(settings, name, "conversations", _conversation)


def preference(settings: RecipeSettings, name: str) -> FilteredRows:
    """Rows with `prompt`, `chosen` and `rejected`."""
    return _read_filtered(settings, name, "pairs", _pair)


def unpaired_preference(settings: RecipeSettings, name: str) -> FilteredRows:
    """Rows with `prompt`, `completion` and `label`; a pair becomes two of them."""
    return _read_filtered(settings, name, "feedback", _feedback)


def prompt_only(settings: RecipeSettings, name: str) -> FilteredRows:
    """Rows with `prompt`, and whatever else they have, for reward functions."""
    return _read_filtered(settings, name, "prompts", _prompt)


Reader = Callable[[Row, bool], list[Row]]


class SkipRow(ValueError):
    """A row that nothing can be learnt from, for a reason that is counted."""


def _read_filtered(settings: RecipeSettings, name: str, kind: str, read: Reader) -> FilteredRows:
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for number, row in enumerate(read_rows(name, settings.split), 1):
        try:
            if unknown := [column for column in UNKNOWN_TO_US if row.get(column)]:
                raise ValueError(
                    f"the column {unknown[0]} is not empty, and no stage here can make it a part of a prompt"
                )
            rows += read(row, settings.plain_text == "chat")
        except SkipRow as reason:
            left_out[str(reason)] = left_out.get(str(reason), 0) + 1
        except KeyError as error:
            raise UserError(
                f"{name}, row {number}: its columns are {', '.join(row)}, but this stage takes {KINDS[kind]}"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}, row {number}: {error}") from error
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise UserError(f"{name} holds nothing to learn from" + (f": {reasons}" if reasons else ""))
    forms = {isinstance(row.get("prompt", row.get("messages")), str) for row in rows}
    if len(forms) > 1:
        raise UserError(f"{name}: plain texts and messages are mixed; --data.plain-text chat makes messages of all")
    return FilteredRows(rows, left_out)


def _conversation(row: Row, chat: bool) -> list[Row]:
    if has(row, "label"):
        raise ValueError(
            "the column label says which answers are good, and this stage would imitate the bad ones too: `scratch-gpt kto` "
            "learns from both; or take the column out"
        )
    if _is_conversation(row):
        messages = _whole_conversation(row)
        if not any(message["role"] == "assistant" for message in messages):
            raise SkipRow("without a turn of the assistant")
        if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
            raise SkipRow("with an empty answer")
        return [{"messages": messages}]
    question, (answer,) = _exchange(row, [_single_answer(row)], chat)
    return [{"prompt": question, "completion": answer}]


def _pair(row: Row, chat: bool) -> list[Row]:
    sides = [row[side] for side in ("chosen", "rejected")]
    whole = all(isinstance(side, list) and side and _messages(side)[0]["role"] != "assistant" for side in sides)
    asked = has(row, "prompt") or has(row, "instruction") or _is_conversation(row)
    if whole or not asked:  # a prompt beside whole conversations is in them, too
        question, chosen, rejected = _split_pair(row, sides[0], sides[1], chat)
    else:
        question, (chosen, rejected) = _exchange(row, sides, chat)
    if chosen == rejected:
        raise SkipRow("with two equal sides")
    return [{"prompt": question, "chosen": chosen, "rejected": rejected}]


def _split_pair(row: Row, chosen: Any, rejected: Any, chat: bool) -> tuple[Any, Any, Any]:
    """Two whole conversations or texts to what they have in common, and how each goes on."""
    if chosen == rejected:
        raise SkipRow("with two equal sides")
    if isinstance(chosen, str) and isinstance(rejected, str):
        spoken = [_human_and_assistant(text) for text in (chosen, rejected)] if chat else []
        if not spoken or None in spoken:
            return _split_texts(chosen, rejected, chat)
        chosen, rejected = spoken
    chosen, rejected = _with_system(row, _messages(chosen)), _with_system(row, _messages(rejected))
    alike = (one == other for one, other in zip(chosen, rejected, strict=False))
    common = len(list(itertools.takewhile(bool, alike)))
    question, ends = chosen[:common], [chosen[common:], rejected[common:]]
    if not question or not all(ends):
        raise ValueError("chosen and rejected do not begin alike and then differ")
    if any(len(end) > 1 for end in ends):
        raise SkipRow("whose sides differ in more than the last turn")
    _check_question(question)
    return question, *(_answer(end, chat=True) for end in ends)


def _human_and_assistant(text: str) -> list[dict[str, str]] | None:
    """The messages of a text as HH-RLHF writes them, each after two line breaks and who speaks."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _split_texts(chosen: str, rejected: str, chat: bool) -> tuple[Any, Any, Any]:
    """Parted at the last white space that they have in common, with which what differs begins."""
    common = os.path.commonprefix([chosen, rejected])
    end = max((place for place, character in enumerate(common) if character.isspace()), default=0)
    if not common[:end].strip():
        raise SkipRow("with two sides that do not begin alike")
    question, ends = common[:end], (chosen[end:], rejected[end:])
    if not chat:
        return question, *(_answer(text, chat) for text in ends)
    return [{"role": "user", "content": question}], *(_answer(text.strip(), chat) for text in ends)


def _feedback(row: Row, chat: bool) -> list[Row]:
    if has(row, "chosen"):
        pair = _pair(row, chat)[0]
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(f"label is {label!r}: give true for a good completion and false for a bad one")
    if _is_conversation(row):
        messages = _whole_conversation(row)
        if messages[-1]["role"] != "assistant":
            raise SkipRow("whose last turn is not the assistant's")
        question, answer = messages[:-1], _answer(messages[-1:], chat=True)
        _check_question(question)
    else:
        question, (answer,) = _exchange(row, [_single_answer(row)], chat)
    return [{"prompt": question, "completion": answer, "label": bool(label)}]


def _prompt(row: Row, chat: bool) -> list[Row]:
    if _is_conversation(row) and not has(row, "prompt"):  # a conversation up to its last answer
        messages = _whole_conversation(row)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] == "user" for message in messages):
            raise SkipRow("without a question")
        return [{**row, "prompt": messages}]
    return [{**row, "prompt": _exchange(row, [], chat)[0]}]


# ------------------------------------------------------------------------------------------------ its parts


def has(row: Row, column: str) -> bool:
    """Parquet and `datasets` fill in None where a row does not have a column."""
    return row.get(column) is not None


def _is_conversation(row: Row) -> bool:
    return has(row, "messages") or has(row, "conversations")


def _whole_conversation(row: Row) -> list[dict[str, str]]:
    messages = _with_system(row, _messages(row["messages"] if has(row, "messages") else row["conversations"]))
    if not messages:
        raise SkipRow("with an empty conversation")
    return messages


def _with_system(row: Row, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """``messages``, begun by the column `system` where there is one; an empty system message is none."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = _text(row, "system").strip()
    if system and messages and messages[0]["role"] == "system":
        raise ValueError("it has a column system, and its first message is of the system as well")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _single_answer(row: Row) -> Any:
    for column in ("output", "response") if has(row, "instruction") else ("completion", "response", "chosen"):
        if has(row, column):
            return row[column]
    raise KeyError("completion")


def _exchange(row: Row, answers: list[Any], chat: bool) -> tuple[Any, list[Any]]:
    """What is asked, and the answers to it: messages if any of them is, else texts."""
    if has(row, "prompt"):
        question = row["prompt"]
    elif has(row, "instruction"):
        question, chat = (
            "\n\n".join(filter(None, (_text(row, name).strip() for name in ("instruction", "input")))),
            True,
        )
    elif answers and _is_conversation(row):
        question = row["messages"] if has(row, "messages") else row["conversations"]
    else:
        raise KeyError("prompt")
    chat = chat or has(row, "system") or not all(isinstance(text, str) for text in (question, *answers))
    if isinstance(question, str):
        if not question.strip():
            raise SkipRow("with an empty prompt")
        question = [{"role": "user", "content": question}] if chat else question
    else:
        question = _messages(question)
    if chat:
        question = _with_system(row, question)
        _check_question(question)
    return question, [_answer(answer, chat) for answer in answers]


def _check_question(messages: list[dict[str, str]]) -> None:
    if not any(message["content"].strip() for message in messages):
        raise SkipRow("with an empty prompt")
    if messages[-1]["role"] == "assistant":
        raise ValueError("a prompt ends with a turn of the assistant, which has nothing to answer then")


def _answer(value: Any, chat: bool) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise SkipRow("with an empty answer")
        return [{"role": "assistant", "content": value}] if chat else value
    messages = _messages([value] if isinstance(value, dict) else value)
    if not messages or not all(message["content"].strip() for message in messages):
        raise SkipRow("with an empty answer")
    if len(messages) > 1:
        raise SkipRow("whose answer is more than one turn")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"an answer is a turn of the {messages[-1]['role']}, not the assistant's")
    return messages


def _text(row: Row, column: str) -> str:
    """What stands in a column that may be empty."""
    value = row.get(column)
    if value is None or isinstance(value, float) and math.isnan(value):  # as pandas writes it
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{column} is a {type(value).__name__}, not text")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} where messages belong: a list of {{role, content}}")
    messages = []
    for turn in value:
        if (
            not isinstance(turn, dict)
            or not {"role", "content"} <= turn.keys()
            and not {"from", "value"} <= turn.keys()
        ):
            raise ValueError(f"a message is {turn!r}: it needs role and content (or from and value)")
        role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}: the roles are {', '.join(ROLES)}")
        if turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError("a message calls tools, which no stage here can write down")
        if not isinstance(content, str):
            raise TypeError(f"a message's content is a {type(content).__name__}, not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages
