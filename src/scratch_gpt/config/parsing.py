"""Fill a command's settings from a YAML file and the command line.

The settings of a command are one dataclass; the string under a field is its ``--help`` and its documentation. The order
of precedence is default < ``--config FILE.yaml`` < ``--section.field value``. Nothing here imports torch, so that
``--help`` answers at once.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from scratch_gpt.config.fields import all_settings, find_setting
from scratch_gpt.config.help import format_help, in_words
from scratch_gpt.config.renamed import renamed_to
from scratch_gpt.errors import UserError
from scratch_gpt.files import write_text

Settings = TypeVar("Settings")
GENERAL_OPTIONS = ("config", "print_config", "help")


def parse_settings(settings_class: type[Settings], arguments: Sequence[str], prog: str) -> Settings:
    """Turn command-line words into a filled ``settings_class``; print the help page and exit for ``--help``.

    Raises:
        UserError: names that do not exist or were renamed, values of the wrong type, or numbers out of range.
    """
    words = _normalize(arguments, settings_class)
    if "-h" in words or "--help" in words:
        print(format_help(settings_class, prog), end="")
        raise SystemExit(0)
    given = list(_given_settings(words, prog))
    _check_names(settings_class, [name for name, _ in given], prog)

    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(settings_class)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of its own future versions
            parsed = parser.instantiate(parser.parse_args(words))
    except jsonargparse.ArgumentError as error:
        problems = _wrong_values(settings_class, given) or _missing(settings_class, given) or [str(error)]
        raise UserError("\n".join([*problems, f"See {prog} --help."])) from error
    settings = settings_class(**{f.name: parsed[f.name] for f in dataclasses.fields(settings_class)})  # type: ignore[arg-type]
    check_limits(settings)
    return settings


def check_limits(settings: Any) -> None:
    """Compare every number with the limits of its field.

    Raises:
        UserError: one message that names every setting that is out of range and its limit.
    """
    settings_class: Any = type(settings)
    known = all_settings(settings_class)
    problems = []
    for name, value in flatten(settings).items():
        problem = known[name].problem_with(value) if name in known else None
        if problem:
            problems.append(f"--{name} is {value}; {problem}")
    if problems:
        raise UserError("\n".join(problems))


_BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, name: str) -> int:
    """``80GB`` (10^9 bytes each), ``24GiB`` (2^30 each), ``512 MB`` or a plain number of bytes.

    Raises:
        UserError: anything else; it calls the setting ``name``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match.group(2).upper() not in _BYTES or not float(match.group(1)):
        raise UserError(f"--{name} is {text!r}; give an amount of memory such as 80GB, 24GiB or 512MB")
    return int(float(match.group(1)) * _BYTES[match.group(2).upper()])


def save_settings(settings: Any, path: Path) -> None:
    """Write ``settings`` as a YAML file that ``--config`` takes."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))


def flatten(settings: Any) -> dict[str, Any]:
    """``{"training.learning_rate": 0.004, ...}``: every field by the name it has on the command line."""

    def walk(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict) and value:
                flat |= walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value
        return flat

    return walk("", settings if isinstance(settings, dict) else dataclasses.asdict(settings))


def _normalize(arguments: Sequence[str], settings_class: Any) -> list[str]:
    """``--run-dir`` is ``--run_dir``, ``--fresh`` alone is ``--fresh=true``, a first word alone is the POSITIONAL field."""
    positional = getattr(settings_class, "POSITIONAL", None)
    if positional is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    switches = {f"--{name}" for name, info in all_settings(settings_class).items() if info.type is bool}
    words: list[str] = []
    for position, word in enumerate(arguments):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--from_" if name == "--from" else name  # a field cannot be called from
            word = "--" + name[2:].replace("-", "_") + equals + value
            following = arguments[position + 1 : position + 2]
            if word in switches and (not following or following[0].startswith("--")):
                word += "=true"
        words.append(word)
    return words


def _given_settings(words: Sequence[str], prog: str) -> Iterator[tuple[str, Any]]:
    """Every setting that the command line or a ``--config`` file gives, with its value."""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            yield word, None
        elif name == "print_config":
            continue
        else:
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise UserError(f"--{name} expects a value. See {prog} --help.")
            if name == "config":
                yield from flatten(_read_yaml(value)).items()
            else:
                read = _as_yaml(value)
                yield from flatten({name.rstrip("+"): read if isinstance(read, dict) else value}).items()


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--config: {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path} as YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"--config: {path} does not hold settings, as lines of the form 'name: value'")
    return values or {}


def _check_names(settings_class: Any, names: list[str], prog: str) -> None:
    """Refuse names that are no settings: renamed ones with the new name, others with the nearest valid one."""
    valid = [*all_settings(settings_class), *GENERAL_OPTIONS]
    problems = []
    for name in names:
        new = renamed_to(settings_class, name)
        if find_setting(settings_class, name):
            continue
        if new:
            problems.append(f"the setting {name!r} is called {new!r} now.")
        else:
            problems.append(f"unknown setting {name!r}.{_nearest(name, valid)}")
    if problems:
        raise UserError("\n".join([*problems[:-1], f"{problems[-1]} See {prog} --help."]))


def _wrong_values(settings_class: Any, given: list[tuple[str, Any]]) -> list[str]:
    """Each given value that is not of its setting's type, as one line."""
    import jsonargparse

    values: dict[str, Any] = {}
    for name, value in given:
        info = find_setting(settings_class, name)
        if info is not None and info.name == name and not info.is_section:
            values[name] = value
    problems = []
    for name, value in values.items():
        annotation = all_settings(settings_class)[name].type
        one = jsonargparse.ArgumentParser(exit_on_error=False)
        one.add_argument("--value", type=annotation)
        try:
            if isinstance(value, str):
                one.parse_args([f"--value={value}"])
            else:
                one.parse_object({"value": value})
        except jsonargparse.ArgumentError:
            problems.append(f"--{name} is {value!r}; it must be {in_words(annotation)}")
    return problems


def _missing(settings_class: Any, given: list[tuple[str, Any]]) -> list[str]:
    """Each required setting that is not given, as one line."""
    names = {name for name, _ in given}
    return [
        f"--{f.name} is required"
        for f in dataclasses.fields(settings_class)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in names
    ]


def refuse_unknown_command(name: str, valid: list[str]) -> NoReturn:
    """Raise a UserError that names the command of ``valid`` that is nearest to ``name``."""
    raise UserError(f"unknown command {name!r}.{_nearest(name, valid)} The commands are: {', '.join(valid)}.")


def _nearest(name: str, valid: list[str]) -> str:
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
