"""Convert rows with any of the usual columns to one of TRL's dataset types.

| columns | what they are |
|---|---|
| `messages` | a conversation: a list of {role, content} |
| `conversations` | a conversation in ShareGPT's format: a list of {from, value} |
| `prompt`, `completion` (or `response`) | text or messages |
| `instruction`, `output`, optional `input` | Alpaca's format: a question, its subject, the answer |
| `prompt`, `chosen`, `rejected` | a preference pair; without `prompt`, both sides are full conversations or texts that begin alike |
| `instruction` or `conversations`, `chosen`, `rejected` | a preference pair in Alpaca's or ShareGPT's format |
| any of these with a completion, and `label` | a completion, and whether it is desirable |
| `prompt` | a prompt alone; also `instruction`, or a conversation, up to the assistant's last message |

An optional column `system` becomes the first message. The converted rows hold messages; or text, where the data is text and
`--plain-text continue` says that texts are continued rather than answered.
"""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scratch_gpt.alignment.data.messages import (
    Messages,
    SkipRow,
    add_system_message,
    check_prompt,
    parse_completion,
    parse_messages,
    text_column,
)
from scratch_gpt.alignment.data.read_rows import Row, read_rows
from scratch_gpt.errors import UserError

UNSUPPORTED_COLUMNS = ("tools", "history", "image", "images", "video", "videos", "audio", "audios")
"""Columns that would have to be part of the prompt."""


@dataclass(frozen=True)
class FilteredRows:
    """Rows, and how many others were skipped for each reason."""

    rows: list[Row]
    skipped: dict[str, int]

    def describe(self) -> str:
        """Format the counts as one line."""
        reasons = _count_reasons(self.skipped)
        return f"{len(self.rows):,} rows" + (f"; skipped: {reasons}" if reasons else "")


# ------------------------------------------------------------------------------------------------ the types


def prompt_completion(name: str, split: str = "train", plain_text: str = "chat") -> FilteredRows:
    """Read rows with `prompt` and `completion`; or with `messages`, all of whose assistant turns are to be learned.

    As all four functions here:

    Args:
        name: A file, a folder that `datasets` saved, a dataset on the Hub, or "bundled".
        split: The split to read, of a dataset that has several.
        plain_text: Whether texts are "chat" (what a user and the assistant say) or texts to "continue".

    Raises:
        UserError: there is no such data, no row of it can be used, or one has other columns or malformed values.
    """
    columns = "messages; conversations (ShareGPT); prompt, completion (or chosen); instruction, output (Alpaca)"
    return _convert_rows(name, split, plain_text, columns, _to_prompt_completion)


def preference(name: str, split: str = "train", plain_text: str = "chat") -> FilteredRows:
    """Read rows with `prompt`, `chosen` and `rejected`; arguments and errors: see :func:`prompt_completion`."""
    columns = "prompt, chosen, rejected; chosen, rejected (full conversations); instruction, chosen, rejected"
    return _convert_rows(name, split, plain_text, columns, _to_preference)


def unpaired_preference(name: str, split: str = "train", plain_text: str = "chat") -> FilteredRows:
    """Read rows with `prompt`, `completion` and `label`; a preference pair becomes two of them.

    Arguments and errors: see :func:`prompt_completion`.
    """
    columns = "prompt, completion, label; or preference pairs: prompt, chosen, rejected"
    return _convert_rows(name, split, plain_text, columns, _to_unpaired_preference)


def prompt_only(name: str, split: str = "train", plain_text: str = "chat") -> FilteredRows:
    """Read rows with `prompt`; all other columns are kept, for reward functions.

    Arguments and errors: see :func:`prompt_completion`.
    """
    columns = "prompt; instruction; messages; conversations"
    return _convert_rows(name, split, plain_text, columns, _to_prompt_only)


def _convert_rows(
    name: str, split: str, plain_text: str, columns: str, convert: Callable[[Row, bool], list[Row]]
) -> FilteredRows:
    """Convert each row by ``convert(row, is_chat)``; ``columns``: those that it takes, for messages."""
    rows: list[Row] = []
    skipped: dict[str, int] = {}
    for number, row in enumerate(read_rows(name, split), 1):
        try:
            if unsupported := [column for column in UNSUPPORTED_COLUMNS if row.get(column)]:
                raise ValueError(f"the column {unsupported[0]} is not supported, and not empty: remove it")
            rows += convert(row, plain_text == "chat")
        except SkipRow as reason:
            skipped[str(reason)] = skipped.get(str(reason), 0) + 1
        except KeyError as error:
            raise UserError(
                f"{name}, row {number}: its columns are {', '.join(row)}, but this command takes {columns}"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}, row {number}: {error}") from error
    if not rows:
        reasons = _count_reasons(skipped)
        raise UserError(f"{name} has no usable rows" + (f": {reasons}" if reasons else ""))
    if len({isinstance(row.get("prompt", row.get("messages")), str) for row in rows}) > 1:
        raise UserError(f"{name}: plain texts and messages are mixed; --plain-text chat makes messages of all")
    return FilteredRows(rows, skipped)


def _count_reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


# ------------------------------------------------------------------------------------------------ one row


def _to_prompt_completion(row: Row, is_chat: bool) -> list[Row]:
    if _has(row, "label"):
        raise ValueError(
            "the column label says which completions are good, but this command would learn the bad ones, too: "
            "`scratch-gpt kto` learns from both; or remove the column"
        )
    if _has_conversation(row):
        messages = _conversation(row)
        if not any(message["role"] == "assistant" for message in messages):
            raise SkipRow("without a message of the assistant")
        if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
            raise SkipRow("with an empty completion")
        return [{"messages": messages}]
    prompt, (completion,) = _prompt_and_completions(row, [_completion_column(row)], is_chat)
    return [{"prompt": prompt, "completion": completion}]


def _to_preference(row: Row, is_chat: bool) -> list[Row]:
    sides = [row["chosen"], row["rejected"]]
    full = all(isinstance(side, list) and side and parse_messages(side)[0]["role"] != "assistant" for side in sides)
    has_prompt = _has(row, "prompt") or _has(row, "instruction") or _has_conversation(row)
    if full or not has_prompt:  # full conversations repeat the prompt
        prompt, chosen, rejected = _extract_prompt(row, row["chosen"], row["rejected"], is_chat)
    else:
        prompt, (chosen, rejected) = _prompt_and_completions(row, sides, is_chat)
    if chosen == rejected:
        raise SkipRow("with two equal sides")
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


def _to_unpaired_preference(row: Row, is_chat: bool) -> list[Row]:
    if _has(row, "chosen"):
        pair = _to_preference(row, is_chat)[0]
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
        ]
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(f"label is {label!r}: give true for a desirable completion and false for an undesirable one")
    if _has_conversation(row):
        messages = _conversation(row)
        if messages[-1]["role"] != "assistant":
            raise SkipRow("whose last message is not the assistant's")
        prompt, completion = messages[:-1], parse_completion(messages[-1:], is_chat=True)
        check_prompt(prompt)
    else:
        prompt, (completion,) = _prompt_and_completions(row, [_completion_column(row)], is_chat)
    return [{"prompt": prompt, "completion": completion, "label": bool(label)}]


def _to_prompt_only(row: Row, is_chat: bool) -> list[Row]:
    if _has_conversation(row) and not _has(row, "prompt"):
        messages = _conversation(row)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] == "user" for message in messages):
            raise SkipRow("without a message of the user")
        return [{**row, "prompt": messages}]
    return [{**row, "prompt": _prompt_and_completions(row, [], is_chat)[0]}]


# ------------------------------------------------------------------------------------------------ prompts


def _prompt_and_completions(row: Row, completions: list[Any], is_chat: bool) -> tuple[Any, list[Any]]:
    """Return the row's prompt and the ``completions``: all of them messages if any of them is, else text."""
    if _has(row, "prompt"):
        prompt = row["prompt"]
    elif _has(row, "instruction"):
        prompt = "\n\n".join(filter(None, (text_column(row, "instruction"), text_column(row, "input"))))
        is_chat = True
    elif completions and _has_conversation(row):
        prompt = _conversation_column(row)
    else:
        raise KeyError("prompt")
    is_chat = is_chat or _has(row, "system") or not all(isinstance(value, str) for value in (prompt, *completions))
    if isinstance(prompt, str):
        if not prompt.strip():
            raise SkipRow("with an empty prompt")
        prompt = [{"role": "user", "content": prompt}] if is_chat else prompt
    else:
        prompt = parse_messages(prompt)
    if is_chat:
        prompt = add_system_message(prompt, text_column(row, "system"))
        check_prompt(prompt)
    return prompt, [parse_completion(completion, is_chat) for completion in completions]


def _extract_prompt(row: Row, chosen: Any, rejected: Any, is_chat: bool) -> tuple[Any, Any, Any]:
    """Split two full conversations, or texts, into the prompt that they share and the completion of each."""
    if chosen == rejected:
        raise SkipRow("with two equal sides")
    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogs = [_parse_dialog(text) for text in (chosen, rejected)] if is_chat else []
        if not dialogs or None in dialogs:
            return _extract_prompt_text(chosen, rejected, is_chat)
        chosen, rejected = dialogs
    system = text_column(row, "system")
    chosen, rejected = (add_system_message(parse_messages(side), system) for side in (chosen, rejected))
    equal = (one == other for one, other in zip(chosen, rejected, strict=False))
    length = len(list(itertools.takewhile(bool, equal)))
    prompt, completions = chosen[:length], [chosen[length:], rejected[length:]]
    if not prompt or not all(completions):
        raise ValueError("chosen and rejected do not begin alike and then differ")
    if any(len(completion) > 1 for completion in completions):
        raise SkipRow("whose sides differ in more than the last message")
    check_prompt(prompt)
    return prompt, *(parse_completion(completion, is_chat=True) for completion in completions)


def _parse_dialog(text: str) -> Messages | None:
    """Parse HH-RLHF's format, where each turn follows two line breaks and its speaker; None for other texts."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    speakers_and_texts = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[speaker], "content": turn.strip()} for speaker, turn in speakers_and_texts]


def _extract_prompt_text(chosen: str, rejected: str, is_chat: bool) -> tuple[Any, Any, Any]:
    """Split two texts at the last white space of their common beginning; the white space goes to the completions."""
    common = os.path.commonprefix([chosen, rejected])
    end = max((index for index, character in enumerate(common) if character.isspace()), default=0)
    prompt, completions = common[:end], (chosen[end:], rejected[end:])
    if not prompt.strip():
        raise SkipRow("with two sides that do not begin alike")
    if not is_chat:
        return prompt, *(parse_completion(text, is_chat) for text in completions)
    return [{"role": "user", "content": prompt}], *(parse_completion(text.strip(), is_chat) for text in completions)


# ------------------------------------------------------------------------------------------------ columns


def _has(row: Row, column: str) -> bool:
    return row.get(column) is not None  # Parquet and `datasets` fill in None where a row lacks a column


def _has_conversation(row: Row) -> bool:
    return _has(row, "messages") or _has(row, "conversations")


def _conversation_column(row: Row) -> Any:
    return row["messages"] if _has(row, "messages") else row["conversations"]


def _conversation(row: Row) -> Messages:
    messages = add_system_message(parse_messages(_conversation_column(row)), text_column(row, "system"))
    if not messages:
        raise SkipRow("with an empty conversation")
    return messages


def _completion_column(row: Row) -> Any:
    for column in ("output", "response") if _has(row, "instruction") else ("completion", "response", "chosen"):
        if _has(row, column):
            return row[column]
    raise KeyError("completion")
