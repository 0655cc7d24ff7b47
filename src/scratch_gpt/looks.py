"""`scratch-gpt pretrain` with looks at the model on the way: what it writes, and what the lm-eval harness makes of it.

Training knows neither of the two; this file brings them together.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from scratch_gpt.config import PretrainSettings
from scratch_gpt.data.sources import split_documents
from scratch_gpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scratch_gpt.training.monitor import Looks, Scores


def pretrain_command(settings: PretrainSettings) -> None:
    """`scratch-gpt pretrain`."""
    from scratch_gpt.training.pretrain import pretrain_command

    pretrain_command(settings, looks_at(settings))


def looks_at(settings: PretrainSettings) -> "Looks | None":
    """What the settings ask for, or None.

    Raises:
        UserError: a pipeline; tasks that the harness does not have, or none and no text to make any from.
    """
    training = settings.training
    if training.sample_every is None and training.benchmark_every is None:
        return None
    if settings.parallel.pipeline > 1:
        raise UserError(
            "--training.sample_every and benchmark_every need a model that can be called, and in a pipeline each process has "
            "some blocks only: leave them out, and `evaluate` the checkpoints instead"
        )
    from scratch_gpt.evaluation.builtin_tasks import questions_for
    from scratch_gpt.evaluation.lm_eval import find_tasks, run_named_tasks, run_tasks
    from scratch_gpt.inference.generate import samples
    from scratch_gpt.training.monitor import Looks

    named = tuple(training.benchmark_tasks)
    if training.benchmark_every is not None and named:
        find_tasks(named, training.benchmark_path)
    elif training.benchmark_every is not None and settings.data_path is not None:
        raise UserError(
            "--training.benchmark_every: the sentence benchmarks are made from the held-out text of --corpus, and this run "
            "has shards alone (--data-path): name --training.benchmark_tasks of the harness"
        )

    def sample(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        return samples(model, tokenizer, training.sample_prompts or [""], settings.seed)

    def benchmark(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "Scores":
        limit = training.benchmark_limit
        if named:
            return run_named_tasks(model, tokenizer, named, training.benchmark_path, limit)
        _, held_out, _ = split_documents(settings)
        tasks = questions_for(model, tokenizer, held_out, limit, settings.seed)
        if not tasks:
            raise ValueError("the held-out text is too short to make questions from")
        with tempfile.TemporaryDirectory() as folder:
            scores = run_tasks(model, tokenizer, tasks, Path(folder))
        return {one.task: {one.metric: one.value, f"{one.metric}_stderr": one.stderr} for one in scores}

    return Looks(sample, benchmark)
