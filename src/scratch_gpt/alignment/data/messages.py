"""Parse messages: lists of {role, content}, or of ShareGPT's {from, value}, with the role names of either."""

import math
from typing import Any

Messages = list[dict[str, str]]

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
"""Role names in the data, and the roles of the chat template that they stand for."""


class SkipRow(ValueError):
    """Raised for a row that nothing can be learned from; the message is the reason, as it is counted."""


def parse_messages(value: Any) -> Messages:
    """Return ``value`` as a list of {role, content}.

    Raises:
        TypeError, ValueError: it is something else, or it holds tool calls or content other than text.
    """
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} instead of messages: give a list of {{role, content}}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not (
            {"role", "content"} <= message.keys() or {"from", "value"} <= message.keys()
        ):
            raise ValueError(f"a message is {message!r}: it needs role and content (or from and value)")
        if "role" in message:
            role, content = message["role"], message["content"]
        else:
            role, content = message["from"], message["value"]
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}: the roles are {', '.join(ROLES)}")
        if message.get("tool_calls") or message.get("function_call"):
            raise ValueError("a message calls tools, which is not supported")
        if not isinstance(content, str):
            raise TypeError(f"a message's content is a {type(content).__name__}, not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def parse_completion(value: Any, is_chat: bool) -> Any:
    """Return a completion as one message of the assistant, or as text where ``value`` is text and ``is_chat`` is false.

    Raises:
        SkipRow: it is empty, or more than one message.
        ValueError: it is not the assistant's.
    """
    if isinstance(value, str):
        if not value.strip():
            raise SkipRow("with an empty completion")
        return [{"role": "assistant", "content": value}] if is_chat else value
    messages = parse_messages([value] if isinstance(value, dict) else value)
    if not messages or not all(message["content"].strip() for message in messages):
        raise SkipRow("with an empty completion")
    if len(messages) > 1:
        raise SkipRow("with a completion of several messages")
    if messages[0]["role"] != "assistant":
        raise ValueError(f"a completion is a message of the {messages[0]['role']}, not of the assistant")
    return messages


def check_prompt(messages: Messages) -> None:
    """Check that the assistant can answer ``messages``.

    Raises:
        SkipRow: they are empty.
        ValueError: the last of them is the assistant's own.
    """
    if not any(message["content"].strip() for message in messages):
        raise SkipRow("with an empty prompt")
    if messages[-1]["role"] == "assistant":
        raise ValueError("a prompt ends with a message of the assistant: end it with one of the user")


def add_system_message(messages: Messages, system: str) -> Messages:
    """Put the text ``system``, unless empty, in front of ``messages``; an empty system message in them is dropped.

    Raises:
        ValueError: ``messages`` begin with a system message of their own.
    """
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        raise ValueError("it has a column system, but its first message is a system message, too")
    return [{"role": "system", "content": system}, *messages]


def text_column(row: dict[str, Any], column: str) -> str:
    """Return the text in a column without surrounding white space; "" if the row does not have it.

    Raises:
        TypeError: it is not text.
    """
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes missing values as NaN
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{column} is a {type(value).__name__}, not text")
    return value.strip()
