"""A run directory: whose it is, whether the same command may go on in it, and its lock.

config.yaml  metrics.jsonl  tokenizer/  data/  checkpoint-{step}/  final/
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from scratch_gpt.config import FREE_KEYS, PretrainSettings, RecipeSettings, flatten, save_settings
from scratch_gpt.errors import UserError
from scratch_gpt.files import is_partial, remove_folder, remove_partial

CONFIG = "config.yaml"
LOCK = ".lock"
# Settings that may differ between the calls that make up one run: they do not change what was already learnt.
FREE = {"run_dir", "fresh", "max_steps", "minutes", "training.log_every", "training.eval_every"}
FREE |= {"training.save_every", "training.keep_last", "training.keep_every", "training.async_save"}
FREE |= {"dry_run", "max_hours"}
# The data order does not depend on how many rows a step takes; the losses do.
FREE |= {"training.total_batch_size", "training.device_batch_size"}
FREE |= {"parallel.pipeline", "parallel.pipeline_schedule", "parallel.pipeline_microbatches"}
FREE |= {"parallel.timeout"}

# Nor what only watches.
FREE |= {"training.trackers", "training.sample_every", "training.sample_prompts", "training.benchmark_every"}
FREE |= {"training.benchmark_tasks", "training.benchmark_path", "training.benchmark_limit", "training.profile_steps"}
FREE |= {"training.memory_snapshot_step"}
STAGES = ("sft", "reward", "dpo", "kto", "grpo", "rloo", "ppo")
FREE |= {f"{stage}.{name}" for stage in STAGES for name in ("save_every", "keep_last", "eval_every", "log_every")}
FREE |= {"trackers"}
RunSettings = PretrainSettings | RecipeSettings


@contextmanager
def run_directory(settings: RunSettings) -> Iterator[Path]:
    """Open ``settings.run_dir`` for one process at a time, new or with the same run in it.

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
    """The settings of the run in ``run_dir`` by their command-line names; empty where there is none."""
    path = run_dir / CONFIG
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def record_settings(run_dir: Path, settings: RunSettings) -> None:
    if stored_settings(run_dir).get("max_steps") != settings.max_steps:
        remove_folder(run_dir / "final")  # of a shorter run: it is in the checkpoint
    save_settings(settings, run_dir / CONFIG)


def has_trained(run_dir: Path) -> bool:
    return (run_dir / "final").is_dir() or any(run_dir.glob("checkpoint-*"))


def _check_same_run(run_dir: Path, settings: RunSettings) -> None:
    stored, asked = stored_settings(run_dir), flatten(settings)
    # A setting that one of the two does not have is of another version or verb, but for keys that users choose.
    compared = stored.keys() & asked.keys() | {
        name for name in stored.keys() ^ asked.keys() if name.startswith(FREE_KEYS)
    }
    changed = [name for name in sorted(compared - FREE) if stored.get(name) != asked.get(name)]
    if not changed:
        return
    if not has_trained(run_dir):
        _empty(run_dir)  # nothing was learnt yet, so nothing is lost
        return
    differences = "; ".join(f"{name} is {stored.get(name)!r} there and {asked.get(name)!r} here" for name in changed)
    raise UserError(
        f"{run_dir} holds a run with other settings: {differences}. "
        "Choose another --run-dir, or start over with --fresh (which deletes that run)."
    )


def _empty(run_dir: Path) -> None:
    """Delete what runs write, and nothing else; the settings last, by which a run is known."""
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
