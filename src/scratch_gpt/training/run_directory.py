"""A run directory: which run it holds, whether a command may resume it, and its lock.

config.yaml  metrics.jsonl  tokenizer/  data/  checkpoint-{step}/  final/
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from scratch_gpt.config import PretrainSettings, RecipeSettings, current_name, find_setting, flatten, save_settings
from scratch_gpt.errors import UserError
from scratch_gpt.files import is_partial, remove_folder, remove_partial

CONFIG = "config.yaml"
LOCK = ".lock"
RunSettings = PretrainSettings | RecipeSettings


@contextmanager
def run_directory(settings: RunSettings) -> Iterator[Path]:
    """Lock ``settings.run_dir`` for this process: a new directory, or one that holds the same run.

    Raises:
        UserError: it holds other files, another run, or a run that is being written right now.
    """
    run_dir = Path(settings.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file")
    has_run = (run_dir / CONFIG).is_file()
    if run_dir.is_dir() and not has_run and any(f.name != LOCK and not is_partial(f) for f in run_dir.iterdir()):
        raise UserError(f"{run_dir} holds files that are not a run's: choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {run_dir}: wait for it or choose another --run-dir") from error
        remove_partial(run_dir)
        if has_run and settings.fresh:
            _empty(run_dir)
        elif has_run:
            _check_same_run(run_dir, settings)
        yield run_dir


def stored_settings(run_dir: Path) -> dict[str, Any]:
    """The settings of the run in ``run_dir`` by the names they have today; empty if it holds none."""
    path = run_dir / CONFIG
    if not path.is_file():
        return {}
    stored = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    return {current_name(name): value for name, value in stored.items()}


def record_settings(run_dir: Path, settings: RunSettings) -> None:
    """Write config.yaml; a ``final/`` that a run of another length made is deleted (its checkpoint has the model)."""
    if stored_settings(run_dir).get("max_steps") != settings.max_steps:
        remove_folder(run_dir / "final")
    save_settings(settings, run_dir / CONFIG)


def has_trained(run_dir: Path) -> bool:
    return (run_dir / "final").is_dir() or any(run_dir.glob("checkpoint-*"))


def _check_same_run(run_dir: Path, settings: RunSettings) -> None:
    """Refuse to resume with settings that change what is trained; before the first checkpoint, start over instead."""
    stored, asked = stored_settings(run_dir), flatten(settings)
    changed = []
    for name in sorted(stored.keys() | asked.keys()):
        setting = find_setting(type(settings), name)
        # A setting that only one of them has belongs to another version or command, unless its name is the user's choice.
        in_both = name in stored and name in asked
        comparable = in_both or (setting is not None and setting.has_user_keys and name != setting.name)
        if comparable and not (setting and setting.may_change) and stored.get(name) != asked.get(name):
            changed.append(name)
    if not changed:
        return
    if not has_trained(run_dir):
        _empty(run_dir)  # no checkpoint is lost
        return
    differences = "; ".join(f"{name} is {stored.get(name)!r} there and {asked.get(name)!r} here" for name in changed)
    raise UserError(
        f"{run_dir} holds a run with other settings: {differences}. "
        "Choose another --run-dir, or start over with --fresh (which deletes that run)."
    )


def _empty(run_dir: Path) -> None:
    """Delete what runs write, and nothing else; config.yaml last, because it marks the directory as a run's."""
    folders = ("final", "adapters", "evaluation", "profile", "tensorboard", "wandb", "tokenizer", "data")
    for folder in (*run_dir.glob("checkpoint-*"), *map(run_dir.joinpath, folders)):
        remove_folder(folder)
    for name in (
        "best.json",
        "report.json",
        "calibration.svg",
        "tracker_run.json",
        "samples.jsonl",
        "metrics.jsonl",
        CONFIG,
    ):
        (run_dir / name).unlink(missing_ok=True)
