"""Run tasks of the lm-eval harness (github.com/EleutherAI/lm-evaluation-harness) in process, without internet.

Our own tasks are written as ordinary harness tasks (a YAML and a JSON Lines file each), so that the same benchmark also
runs from the harness's command line.
"""

import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.builtin_tasks import Question

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# acc compares summed log-probabilities; acc_norm divides them by the length of the choice, for choices of different
# lengths.
METRICS = {"next_sentence": "acc_norm", "word_order": "acc"}


@dataclass(frozen=True)
class Score:
    """Result of one multiple-choice task."""

    task: str
    metric: str
    value: float
    """Accuracy, 0 to 1."""
    stderr: float
    chance: float
    """Accuracy of guessing."""
    questions: int
    """Number of questions."""


def write_tasks(tasks: dict[str, list[Question]], folder: Path) -> None:
    """Write one YAML and one JSON Lines file per task, which the harness finds with ``--include_path folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text(
            "".join(json.dumps(dataclasses.asdict(question)) + "\n" for question in questions), encoding="utf-8"
        )
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": METRICS[name], "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def run_tasks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tasks: dict[str, list[Question]], folder: Path
) -> list[Score]:
    """Write ``tasks`` to ``folder`` and score ``model`` on them."""
    from lm_eval.tasks import TaskManager

    write_tasks(tasks, folder)
    results = _evaluate(model, tokenizer, list(tasks), TaskManager(include_path=str(folder), include_defaults=False))
    return [
        Score(
            task=name,
            metric=METRICS[name],
            value=results[name][f"{METRICS[name]},none"],
            stderr=results[name][f"{METRICS[name]}_stderr,none"],
            chance=1 / len(questions[0].choices),
            questions=len(questions),
        )
        for name, questions in tasks.items()
        if name in results
    ]


def run_named_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    names: tuple[str, ...],
    include_path: str | None,
    limit: int,
) -> dict[str, dict[str, float]]:
    """Score ``model`` on tasks of the harness.

    Args:
        names: names of tasks or groups of tasks.
        include_path: folder of further task files.
        limit: questions per task.

    Returns:
        For each task, and each member of a group, every number that the harness reports, by the name of its metric.
    """
    results = _evaluate(model, tokenizer, list(names), find_tasks(names, include_path), limit)
    return {
        task: {name.removesuffix(",none"): value for name, value in result.items() if isinstance(value, float)}
        for task, result in results.items()
    }


@functools.cache
def find_tasks(names: tuple[str, ...], include_path: str | None) -> "TaskManager":
    """A task manager that knows ``names``: from the files of ``include_path`` alone if they suffice, since listing the
    harness's own tasks takes seconds.

    Raises:
        UserError: a task is in neither.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"--training.benchmark_path: there is no folder {include_path}")
        from_folder = TaskManager(include_path=include_path, include_defaults=False)
        if all(from_folder.match_tasks([name]) for name in names):
            return from_folder
    all_tasks = TaskManager(include_path=include_path)
    if missing := [name for name in names if not all_tasks.match_tasks([name])]:
        where = f" or in {include_path}" if include_path else "; --training.benchmark_path names a folder of task files"
        raise UserError(f"--training.benchmark_tasks: there is no task {', '.join(missing)} in the harness{where}")
    return all_tasks


def _evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    names: list[str],
    task_manager: "TaskManager",
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by task; empty on all but the first process of a machine, where the harness returns none."""
    for logger_name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(logger_name).setLevel(logging.ERROR)
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    datasets.disable_progress_bars()
    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=16,
        max_length=model.config.max_position_embeddings,
    )
    # The harness's progress bars would break up ours.
    language_model.loglikelihood = functools.partial(language_model.loglikelihood, disable_tqdm=True)
    evaluation = lm_eval.simple_evaluate(
        model=language_model,
        tasks=names,
        task_manager=task_manager,
        limit=limit,
        bootstrap_iters=100,
        log_samples=False,
    )
    return evaluation["results"] if evaluation is not None else {}
