"""The lm-eval harness (github.com/EleutherAI/lm-evaluation-harness), in process and without internet.

Tasks are ordinary harness tasks on disk (a YAML and a JSON Lines file each), so the same benchmark runs from the
harness's own command line as well.
"""

import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from scratch_gpt.evaluation.sentences import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# acc compares summed log-probabilities; acc_norm divides them by the length of the choice, which matters where the
# choices differ in length.
METRIC = {"next_sentence": "acc_norm", "word_order": "acc"}


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    value: float
    """Accuracy, 0 to 1."""
    stderr: float
    chance: float
    """Accuracy of guessing."""
    questions: int


def write_tasks(tasks: dict[str, list[Question]], folder: Path) -> None:
    """One YAML and one JSON Lines file per task, for ``--include_path folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, asked in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text(
            "".join(json.dumps(dataclasses.asdict(question)) + "\n" for question in asked), encoding="utf-8"
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
            "metric_list": [{"metric": METRIC[name], "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def run_tasks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tasks: dict[str, list[Question]], folder: Path
) -> list[Score]:
    """Write ``tasks`` to ``folder`` and score ``model`` on them."""
    for noisy in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    write_tasks(tasks, folder)
    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=16,
        max_length=model.config.max_position_embeddings,
    )
    # Its own progress bars would tear ours apart.
    language_model.loglikelihood = functools.partial(language_model.loglikelihood, disable_tqdm=True)
    results = lm_eval.simple_evaluate(
        model=language_model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=100,
        log_samples=False,
    )["results"]
    return [
        Score(
            task=name,
            metric=METRIC[name],
            value=results[name][f"{METRIC[name]},none"],
            stderr=results[name][f"{METRIC[name]}_stderr,none"],
            chance=1 / len(asked[0].choices),
            questions=len(asked),
        )
        for name, asked in tasks.items()
    ]
