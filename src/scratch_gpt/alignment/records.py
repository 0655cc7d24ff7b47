"""The data of every stage: whatever its columns are called, one form.

| columns | what it is |
|---|---|
| `messages` | a conversation: a list of {role, content} |
| `conversations` | the same as ShareGPT has it: a list of {from, value} |
| `prompt`, `completion` | texts or messages |
| `instruction`, `output`, perhaps `input` | Alpaca: a question, what it is about, the answer |
| `prompt`, `chosen`, `rejected` | a pair; without `prompt` both sides are whole conversations that begin alike |
| `instruction`, `chosen`, `rejected`, perhaps `input` | a pair, as Alpaca |
| `prompt`, `completion`, `label` | an answer, and whether it is good |
| `prompt` | only what is asked; or `instruction`, perhaps `input` |

From here on every row has `prompt` and what belongs to it, each as messages, or as text where plain texts are to be continued
rather than answered.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from scratch_gpt.alignment import bundled
from scratch_gpt.config import StageSettings
from scratch_gpt.console import say
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
    "prompts": "prompt; instruction",
}
"""Which columns each kind of data may have."""


@dataclass(frozen=True)
class Told:
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
        return Dataset.from_parquet(str(path)).to_list()
    text = path.read_text(encoding="utf-8")
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
class LearningData:
    """Encoded rows to learn from and to validate on."""

    train: list[Row]
    validation: list[Row]
    chat: bool
    """Whether they are conversations, or plain texts that go on."""
    facts: dict[str, Any]
    """For the card: where they are from, and what was left out."""


def learning_data(
    settings: StageSettings,
    read: Callable[[StageSettings, str], Told],
    encode: Callable[[Row], tuple[Row, int]],
    longest: int,
) -> LearningData:
    """What ``read`` finds, encoded a row at a time, without the rows that are longer than ``longest`` tokens; says so.

    ``encode`` gives an encoded row and how many tokens it takes. Rows to validate on are drawn by the seed, where they have
    no place of their own.

    Raises:
        UserError: nothing is left to learn from, or to validate on.
    """
    told = read(settings, settings.data)
    say(f"data       {settings.data}: {told.describe()}")
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
        facts[name] = Told(fitting, too_long).describe()
        say(f"           {name}: {facts[name]}")
        encoded[name] = fitting
    chat = not isinstance(told.rows[0].get("prompt"), str)
    return LearningData(encoded["training"], encoded["held out"], chat, facts)


def _drawn(settings: StageSettings, rows: list[Row]) -> dict[str, list[Row]]:
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


def conversations(settings: StageSettings, name: str) -> Told:
    """Rows with `prompt` and `completion`, or with `messages` where all the assistant's turns are learnt from."""
    return _told(settings, name, "conversations", _conversation)


def pairs(settings: StageSettings, name: str) -> Told:
    """Rows with `prompt`, `chosen` and `rejected`."""
    return _told(settings, name, "pairs", _pair)


def feedback(settings: StageSettings, name: str) -> Told:
    """Rows with `prompt`, `completion` and `label`; a pair becomes two of them."""
    return _told(settings, name, "feedback", _feedback)


def prompts(settings: StageSettings, name: str) -> Told:
    """Rows with `prompt`, and whatever else they have, for reward functions."""
    return _told(settings, name, "prompts", _prompt)


Reader = Callable[[Row, bool], list[Row]]


class Unusable(ValueError):
    """A row that nothing can be learnt from, for a reason that is counted."""


def _told(settings: StageSettings, name: str, kind: str, read: Reader) -> Told:
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for number, row in enumerate(read_rows(name, settings.split), 1):
        try:
            rows += read(row, settings.plain_text == "chat")
        except Unusable as reason:
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
    return Told(rows, left_out)


def _conversation(row: Row, chat: bool) -> list[Row]:
    if has(row, "messages") or has(row, "conversations"):
        messages = _messages(row["messages"] if has(row, "messages") else row["conversations"])
        if not any(message["role"] == "assistant" for message in messages):
            raise Unusable("without a turn of the assistant")
        if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
            raise Unusable("with an empty answer")
        return [{"messages": messages}]
    column = "output" if has(row, "instruction") else "chosen" if has(row, "chosen") else "completion"
    answer = row[column]
    return [{"prompt": _question(row, chat), "completion": _answer(answer, chat)}]


def _pair(row: Row, chat: bool) -> list[Row]:
    if has(row, "prompt") or has(row, "instruction"):
        pair = {"prompt": _question(row, chat)} | {side: _answer(row[side], chat) for side in ("chosen", "rejected")}
    else:
        pair = _split_pair(*(row[side] for side in ("chosen", "rejected")))
    if pair["chosen"] == pair["rejected"]:
        raise Unusable("with two equal sides")
    return [pair]


def _split_pair(chosen: Any, rejected: Any) -> Row:
    """Two whole conversations to what they have in common and what follows."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise TypeError("a pair of plain texts needs a column prompt")
    chosen, rejected = _messages(chosen), _messages(rejected)
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        raise Unusable("with two equal sides")
    pair = {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}
    if not pair["prompt"] or not pair["chosen"] or not pair["rejected"]:
        raise ValueError("chosen and rejected do not begin alike and then differ")
    return {**pair, **{side: _answer(pair[side], chat=True) for side in ("chosen", "rejected")}}


def _feedback(row: Row, chat: bool) -> list[Row]:
    if has(row, "chosen"):
        pair = _pair(row, chat)[0]
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise ValueError(f"label is {row['label']!r}: give true for a good completion and false for a bad one")
    return [
        {
            "prompt": _question(row, chat),
            "completion": _answer(row["completion"], chat),
            "label": bool(row["label"]),
        }
    ]


def _prompt(row: Row, chat: bool) -> list[Row]:
    if has(row, "messages") and not has(row, "prompt"):  # a conversation up to its last answer
        messages = _messages(row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise Unusable("without a question")
        return [{**row, "prompt": messages}]
    return [{**row, "prompt": _question(row, chat)}]


def has(row: Row, column: str) -> bool:
    """Parquet and `datasets` fill in None where a row does not have a column."""
    return row.get(column) is not None


def _question(row: Row, chat: bool) -> Any:
    """`prompt`, or Alpaca's `instruction` with its `input`."""
    if has(row, "instruction") and not has(row, "prompt"):
        about = str(row.get("input") or "").strip()
        text = str(row["instruction"]).strip() + (f"\n\n{about}" if about else "")
        question: Any = [{"role": "user", "content": text}]
    else:
        question = row["prompt"]
        if isinstance(question, str) and chat:
            question = [{"role": "user", "content": question}]
        elif not isinstance(question, str):
            question = _messages(question)
    if not question or (not isinstance(question, str) and not any(m["content"].strip() for m in question)):
        raise Unusable("with an empty prompt")
    return question


def _answer(value: Any, chat: bool) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("with an empty answer")
        return [{"role": "assistant", "content": value}] if chat else value
    messages = _messages(value)
    if not messages or not all(message["content"].strip() for message in messages):
        raise Unusable("with an empty answer")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"an answer ends with a turn of the {messages[-1]['role']}, not the assistant's")
    return messages


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
        if not isinstance(content, str):
            raise TypeError(f"a message's content is a {type(content).__name__}, not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages
