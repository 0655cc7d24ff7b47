"""Experiment trackers: send the records of metrics.jsonl to Accelerate's trackers as well.

A tracker never ends a run: one that fails is disabled with a message, and metrics.jsonl still has everything. Trackers
receive numbers and the settings of model and training, but no paths, no names of texts and no environment variables.
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
"""Supported trackers. Each name is also that of the Python package and of the extra that installs it."""
PROJECT = "scratch-gpt"
RUN = "tracker_run.json"


def resolve_trackers(trackers: str | list[str]) -> list[str]:
    """Return the trackers that ``--training.trackers`` names; "auto" is trackio if installed.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    if trackers == "auto":
        return ["trackio"] if importlib.util.find_spec("trackio") else []
    names = [trackers] if isinstance(trackers, str) else trackers
    for name in names:
        if name not in NAMES:
            raise UserError(f"trackers: unknown tracker {name!r}; choose from {', '.join(NAMES)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; install it with pip install 'scratch-gpt[{name}]'")
    return names


class Trackers:
    """The active trackers, on the main process only. A run resumed after ``step`` continues its tracker run."""

    def __init__(self, accelerator: Accelerator, settings: PretrainSettings, run_dir: Path, step: int):
        self.active: list[GeneralTracker] = []
        names = resolve_trackers(settings.training.trackers)
        if not names:
            return
        run = _run_name(run_dir)
        options = {
            "trackio": {"name": run, "resume": "allow", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False},
            "wandb": {"name": run, "id": run, "resume": "allow", "dir": str(run_dir), "settings": WANDB_SETTINGS},
            "tensorboard": {"purge_step": step + 1},  # discard what a killed run logged after its checkpoint
        }
        folder = str(run_dir / "tensorboard")
        accelerator.project_configuration.logging_dir = folder
        for name in names:
            accelerator.log_with, accelerator.trackers = filter_trackers([name], folder), []
            try:
                accelerator.init_trackers(PROJECT, settings_to_track(settings), options)
            except Exception as error:  # noqa: BLE001 (no failure of a tracker may end the run)
                _report_failure(name, error)
            else:
                self.active += accelerator.trackers
        accelerator.trackers = []  # finished below: a failure there must not end the run either

    def log(self, record: dict[str, Any]) -> None:
        """Send a record of metrics.jsonl: the numbers of a step, or an event as text with its numbers."""
        values: dict[str, Any] = flatten_numbers(record)
        if "event" in record:
            values["event"] = f"{record['event']}: {record['reason']}" if "reason" in record else record["event"]
        self._each(lambda tracker: tracker.log(values, step=record["step"]))

    def finish(self) -> None:
        """Close all trackers."""
        self._each(lambda tracker: tracker.finish())
        self.active = []

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.active):
            try:
                action(tracker)
            except Exception as error:  # noqa: BLE001 (no failure of a tracker may end the run)
                self.active.remove(tracker)
                _report_failure(tracker.name, error)


# By default wandb sends the command line, the repository's URL and the terminal output.
WANDB_SETTINGS = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
WANDB_SETTINGS |= {"x_disable_stats": True, "silent": True}


def settings_to_track(settings: PretrainSettings) -> dict[str, str | int | float | bool | None]:
    """Return the settings that trackers receive: command-line names to plain values (lists as JSON)."""
    sent = {}
    for name, value in flatten(settings).items():
        setting = find_setting(type(settings), name)
        if setting is not None and setting.tracked:
            sent[name] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
    return sent


def flatten_numbers(record: dict[str, Any], prefix: str = "") -> dict[str, int | float]:
    """Flatten ``{"validation": {"stories": {"loss": 2}}}`` to ``{"validation/stories/loss": 2}``, numbers only."""
    found: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix or name not in ("step", "row", "time")):
            found[prefix + name] = value
    return found


def _run_name(run_dir: Path) -> str:
    """Return the name saved in the run directory, so that a resumed run keeps it; a new run gets a new name."""
    file = run_dir / RUN
    if not file.is_file():
        write_json(file, {"run": f"{run_dir.resolve().name}-{secrets.token_hex(3)}"})
    return json.loads(file.read_text())["run"]


def _report_failure(name: str, error: Exception) -> None:
    print0(
        f"tracker    {name} failed and is disabled ({type(error).__name__}: {error}); metrics.jsonl is still written"
    )
