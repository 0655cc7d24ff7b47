"""The settings of every verb: typed dataclasses, filled from a YAML file and dotted command-line overrides.

A verb's settings are one dataclass; the string under a field is its ``--help`` and its documentation. The order of
precedence is default < ``--config FILE.yaml`` < ``--section.field value``. Unknown names are refused with the nearest
valid one. Nothing here imports torch, so that ``--help`` answers at once.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scratch_gpt.errors import UserError
from scratch_gpt.files import write_text

Settings = TypeVar("Settings")


def parse_settings(settings_class: type[Settings], arguments: Sequence[str], prog: str) -> Settings:
    """Command-line words to a filled ``settings_class``; prints help and exits for ``--help``.

    Raises:
        UserError: an unknown name (with the nearest valid one), or a value of the wrong type.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(
            self, *args: Any, **kwargs: Any
        ) -> str:  # --run-dir and --section.field_name, as the documentation writes them
            help_text: str = super().format_help(*args, **kwargs)
            return re.sub(r"--[a-z_]+(?![\w.])", lambda name: name.group().rstrip("_").replace("_", "-"), help_text)

    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--setting value ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(settings_class)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of its own future versions
            parsed = parser.instantiate(parser.parse_args(_normalise(arguments, settings_class)))
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), _all_names(settings_class), prog)) from error
    settings = settings_class(**{f.name: parsed[f.name] for f in dataclasses.fields(settings_class)})  # type: ignore[arg-type]
    check_limits(settings)
    return settings


# Smallest value allowed, by field name; "more than 0" where 0 itself makes no sense.
_AT_LEAST = {"warmup_steps": 0, "weight_decay": 0, "beta1": 0, "beta2": 0, "decay_fraction": 0, "temperature": 0}
_AT_LEAST |= {"top_k": 0, "rows": 0, "seed": 0, "batch_warmup_steps": 0, "min_lr_ratio": 0, "muon_momentum": 0}
_AT_LEAST |= {"sigmas": 0, "beta": 0, "num_generations": 2}
_BELOW_ONE = {"beta1", "beta2", "mfu", "muon_momentum", "validation_fraction"}
_MORE_THAN_ZERO = {"max_steps", "minutes", "max_characters", "hidden_size", "num_hidden_layers", "num_attention_heads"}
_MORE_THAN_ZERO |= {"num_key_value_heads", "intermediate_size", "max_position_embeddings", "context_length"}
_MORE_THAN_ZERO |= {"total_batch_size", "device_batch_size", "learning_rate", "max_grad_norm", "log_every"}
_MORE_THAN_ZERO |= {"value_learning_rate"}
_MORE_THAN_ZERO |= {"eval_every", "save_every", "keep_last", "limit", "max_new_tokens", "num_return_sequences"}
_MORE_THAN_ZERO |= {"workers", "max_document_characters"}
_MORE_THAN_ZERO |= {"validation_fraction", "window", "max_skips", "max_rollbacks", "rollback_lr_factor"}
_MORE_THAN_ZERO |= {"activation_checkpointing_every", "max_hours", "keep_every"}
_MORE_THAN_ZERO |= {"pipeline", "pipeline_microbatches"}
_MORE_THAN_ZERO |= {"sample_every", "benchmark_every", "benchmark_limit", "memory_snapshot_step"}
_MORE_THAN_ZERO |= {
    "mini_batch_size",
    "num_mini_batches",
    "num_ppo_epochs",
    "lora_rank",
    "batch_size",
    "max_length",
    "num_iterations",
}
_MORE_THAN_ZERO |= {"max_completion_length"}
_MORE_THAN_ZERO |= {"devices", "devices_per_node", "peak_flops", "mfu", "price", "tokens", "max_batch_size"}


# Sections whose keys the user chooses.
FREE_KEYS = ("model.overrides.", "training.mixture.")


def check_limits(settings: Any) -> None:
    """Raises one UserError that names every number that is out of range."""
    problems = []
    for name, value in flatten(settings).items():
        field_name = name.rsplit(".", 1)[-1]
        if isinstance(value, bool) or not isinstance(value, int | float) or name.startswith(FREE_KEYS):
            continue
        if field_name in _MORE_THAN_ZERO and not value > 0:
            problems.append(f"--{name} is {value}; it must be more than 0")
        if field_name in _AT_LEAST and not value >= _AT_LEAST[field_name]:
            problems.append(f"--{name} is {value}; it must be at least {_AT_LEAST[field_name]}")
        if field_name in _BELOW_ONE and not value < 1:
            problems.append(f"--{name} is {value}; it must be below 1")
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


def _normalise(arguments: Sequence[str], settings_class: Any) -> list[str]:
    """``--run-dir`` is ``--run_dir``, ``--fresh`` alone is ``--fresh=true``, and a first word alone is the verb's object."""
    positional = getattr(settings_class, "POSITIONAL", None)
    if positional is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    switches = {f"--{f.name}" for f in dataclasses.fields(settings_class) if f.type is bool}
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


def _all_names(settings_class: Any) -> list[str]:
    names = ["config", "help"]
    for f in dataclasses.fields(settings_class):
        names.append(f.name)
        if dataclasses.is_dataclass(f.type):
            names += [f"{f.name}.{name}" for name in _all_names(f.type)[2:]]
    return names


def _explain(message: str, names: list[str], prog: str) -> str:
    """The parser's complaint, with the nearest valid name where a name is unknown."""
    message = re.sub(r"^Parser key \"(.+?)\":\s*", r"--\1: ", message.strip())
    message = re.sub(r"typing\.|<class '(\w+)'>", r"\1", message)
    optional = re.match(r"(--[\w.]+): .*?Subtypes: \[(\w+), NoneType\].*Given value: (.*)", message, flags=re.DOTALL)
    if optional:
        message = "{}: Expected a {}. Got value: {}".format(*optional.groups())
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)|Option '([\w.]+)' is not accepted", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
    elif in_group:
        name = f"{in_group.group(1)}.{in_group.group(2)}"
    else:
        return f"{message}\nSee {prog} --help."
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown setting {name!r}.{hint} See {prog} --help."


def nearest_or_refuse(name: str, valid: list[str]) -> str:
    """Never returns a guess: raises a UserError that names the nearest of ``valid``."""
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown verb {name!r}.{hint} The verbs are: {', '.join(valid)}.")
