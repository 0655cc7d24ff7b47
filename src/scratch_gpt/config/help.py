"""The output of ``scratch-gpt COMMAND --help``: common settings first, then one group per section."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
import typing
from functools import cache
from typing import Any

from scratch_gpt.config.fields import all_settings

INDENT = 26


@cache
def field_docs(settings_class: Any) -> dict[str, str]:
    """The string under each field of a settings dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for base in (c for c in reversed(settings_class.__mro__) if dataclasses.is_dataclass(c)):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, base)))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def format_help(settings_class: Any, prog: str) -> str:
    """The help page of a command, from the docstrings and defaults of its settings."""
    positional = getattr(settings_class, "POSITIONAL", None)
    usage = (
        f"usage: {prog} {f'[{positional.upper()}] ' if positional else ''}[--config FILE.yaml] [--SETTING VALUE ...]"
    )
    lines = [usage, "", *_wrap(_summary(settings_class), 0)]
    for title, entries in _groups(settings_class).items():
        lines += ["", f"{title}:"]
        for name, text in entries:
            lines += _entry(name, text)
    return "\n".join(lines) + "\n"


def _groups(settings_class: Any) -> dict[str, list[tuple[str, str]]]:
    """Title of each group: its entries, each a name with its values and its description."""
    fields = dataclasses.fields(settings_class)
    top = [f for f in fields if not dataclasses.is_dataclass(f.type)]
    common = [f for f in top if f.metadata.get("common")]
    first = common or top
    groups = {"Common settings" if common else "Settings": [_describe(settings_class, f, "") for f in first]}
    for f in top:
        if f not in first:
            title = _title(settings_class, f.name)
            groups.setdefault(title, []).append(_describe(settings_class, f, ""))
    groups["Settings from a file"] = [
        ("--config FILE.yaml", "Read settings from this file; those on the command line take precedence."),
        ("--print-config", "Print the resulting settings as YAML, for such a file, and exit."),
        ("-h, --help", "Print this page and exit."),
    ]
    for f in fields:
        if dataclasses.is_dataclass(f.type):
            inner = [_describe(f.type, g, f"{f.name}.") for g in dataclasses.fields(f.type)]
            groups[f"{f.name} - {_summary(f.type).rstrip('.')}"] = inner
    for info in all_settings(settings_class).values():
        if info.item_class is not None:
            inner = [_describe(info.item_class, g, "", dashes=False) for g in dataclasses.fields(info.item_class)]
            groups[f"{info.name} - fields of each entry"] = inner
    return groups


def _title(settings_class: Any, name: str) -> str:
    """The class that declares a top-level field names its group."""
    owner = next(c for c in reversed(settings_class.__mro__) if name in getattr(c, "__annotations__", {}))
    return owner.__dict__.get("HELP_TITLE", "More settings")


def _describe(settings_class: Any, f: Any, prefix: str, dashes: bool = True) -> tuple[str, str]:
    name = prefix + f.name if prefix else f.name.rstrip("_").replace("_", "-") if dashes else f.name
    text = field_docs(settings_class).get(f.name, "")
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
        text = f"{text} Required."
    elif "Default:" not in text:
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        text = text if default is None or default in ([], {}) else f"{text} Default: {_shown(default)}."
    return f"{'--' if dashes else ''}{name} {values_of(f.type)}".rstrip(), text


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def values_of(annotation: Any) -> str:
    """The values that a setting takes, in capitals or as a choice."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (types.UnionType, typing.Union):
        return values_of(next(a for a in arguments if a is not types.NoneType))
    if origin is list:
        return "[A, B, ...]"
    if origin is dict:
        return "{NAME: VALUE, ...}"
    return {int: "N", float: "X", bool: "", str: "TEXT"}.get(annotation, "VALUE")


def in_words(annotation: Any) -> str:
    """The values that a setting takes, for a message: "a whole number"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(a) for a in arguments if a is not types.NoneType)
    if dataclasses.is_dataclass(annotation):
        return "a mapping with the fields " + ", ".join(f.name for f in dataclasses.fields(annotation))
    if origin is list:
        return f"a list, each entry {in_words(arguments[0])}"
    if origin is dict:
        return "a mapping" if arguments[1] is Any else f"a mapping, each value {in_words(arguments[1])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(annotation, "a value")


def _summary(settings_class: Any) -> str:
    return " ".join((settings_class.__doc__ or "").split())


def _entry(name: str, text: str) -> list[str]:
    head = f"  {name}"
    wrapped = _wrap(text, INDENT)
    if len(head) + 2 > INDENT:
        return [head, *wrapped]
    return [head.ljust(INDENT) + wrapped[0].lstrip(), *wrapped[1:]] if wrapped else [head]


def _wrap(text: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 110)
    margin = " " * indent
    return textwrap.wrap(
        text, max(width, indent + 30), initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
