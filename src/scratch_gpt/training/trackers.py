"""Dashboards: what goes into metrics.jsonl, sent to Accelerate's trackers as well.

A tracker is a guest. One that fails is dropped with a word, for metrics.jsonl has everything and a run of a week is worth
more than its curves. It gets numbers and the settings of model and training: no paths, no names of texts, no environment.
"""

import importlib.util
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers

from scratch_gpt.config import PretrainSettings, find_setting, flatten
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError
from scratch_gpt.files import write_json

NAMES = ("trackio", "tensorboard", "wandb")
"""Each is the name of its package and of our extra, too."""
PROJECT = "scratch-gpt"
RUN = "tracker_run.json"


def resolve_trackers(asked: str | list[str]) -> list[str]:
    """The trackers of ``--training.trackers``; "auto" is trackio where it is installed.

    Raises:
        UserError: one that we do not know or that is not installed.
    """
    if asked == "auto":
        return ["trackio"] if importlib.util.find_spec("trackio") else []
    names = [asked] if isinstance(asked, str) else asked
    for name in names:
        if name not in NAMES:
            raise UserError(f"--training.trackers: there is no tracker {name!r}, there are {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--training.trackers: {name} is not installed: pip install 'scratch-gpt[{name}]'")
    return names


class Trackers:
    """On the main process only. A run that is resumed after ``step`` goes on in the trackers' run of before."""

    def __init__(self, accelerator: Accelerator, settings: PretrainSettings, run_dir: Path, step: int):
        self.alive: list[GeneralTracker] = []
        names = resolve_trackers(settings.training.trackers)
        if not names:
            return
        run = _run_name(run_dir)
        options = {
            "trackio": {"name": run, "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False},
            "wandb": {"name": run, "id": run, "resume": "allow", "dir": str(run_dir), "settings": WANDB_SETTINGS},
            "tensorboard": {"purge_step": step + 1},  # what a killed run wrote beyond its checkpoint
        }
        folder = str(run_dir / "tensorboard")
        accelerator.project_configuration.logging_dir = folder
        for name in names:
            accelerator.log_with, accelerator.trackers = filter_trackers([name], folder), []
            try:
                accelerator.init_trackers(PROJECT, settings_to_track(settings), options)
            except Exception as error:  # noqa: BLE001 (whatever ails a guest)
                _report_dropped(name, error)
            else:
                self.alive += accelerator.trackers
        accelerator.trackers = []  # ours to finish: one that fails then must not end the run either

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl: the numbers of a step, or an event in words and the numbers it has."""
        values: dict[str, Any] = flatten_numbers(record)
        if "event" in record:
            values["event"] = f"{record['event']}: {record['reason']}" if "reason" in record else record["event"]
        self._each(lambda tracker: tracker.log(values, step=record["step"]))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self.alive = []

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.alive):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 (whatever ails a guest)
                self.alive.remove(tracker)
                _report_dropped(tracker.name, error)


# wandb would send the command line, the repository's address and what the terminal shows.
WANDB_SETTINGS = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
WANDB_SETTINGS |= {"x_disable_stats": True, "silent": True}


def settings_to_track(settings: PretrainSettings) -> dict[str, str | int | float | bool | None]:
    """The settings that are sent to trackers, each a plain value under its name on the command line."""
    sent = {}
    for name, value in flatten(settings).items():
        setting = find_setting(type(settings), name)
        if setting is not None and setting.tracked:
            sent[name] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
    return sent


def flatten_numbers(record: dict[str, Any], prefix: str = "") -> dict[str, int | float]:
    """``{"validation": {"stories": {"loss": 2}}}`` to ``{"validation/stories/loss": 2}``; words and None left out."""
    found: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix or name not in ("step", "row", "time")):
            found[prefix + name] = value
    return found


def _run_name(run_dir: Path) -> str:
    """Kept in the run directory: a resumed run has the name of before, a fresh one in the same place another."""
    file = run_dir / RUN
    if not file.is_file():
        write_json(file, {"run": f"{run_dir.resolve().name}-{secrets.token_hex(3)}"})
    return json.loads(file.read_text())["run"]


def _report_dropped(name: str, error: Exception) -> None:
    print0(f"tracker    {name} failed and gets nothing more ({type(error).__name__}: {error}); metrics.jsonl goes on")
