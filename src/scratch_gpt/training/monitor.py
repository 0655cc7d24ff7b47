"""Everything that watches a run without changing it: trackers, profiler, samples, benchmarks."""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import PretrainSettings
from scratch_gpt.console import print0, printable
from scratch_gpt.data.sources import split_documents
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.errors import UserError
from scratch_gpt.training.checkpoint import TrainingState
from scratch_gpt.training.metrics import MetricsFile
from scratch_gpt.training.profiler import Profiler, check_profiler
from scratch_gpt.training.trackers import Trackers, resolve_trackers

# The lm-eval harness and transformers' generation are imported when they are first used: they take seconds.


def check_monitoring(settings: PretrainSettings, device: torch.device) -> None:
    """Check the settings of what watches a run, before it starts.

    Raises:
        UserError: a tracker or task that does not exist, samples or benchmarks in a pipeline, benchmarks without text.
    """
    training = settings.training
    resolve_trackers(training.trackers)
    check_profiler(training, device)
    if training.sample_every is None and training.benchmark_every is None:
        return
    if settings.parallel.pipeline > 1:
        raise UserError(
            "--training.sample_every and benchmark_every need the full model in each process, and in a pipeline each process "
            "has some blocks only: drop them, and `evaluate` the checkpoints instead"
        )
    if training.benchmark_every is not None and training.benchmark_tasks:
        from scratch_gpt.evaluation.lm_eval import find_tasks

        find_tasks(tuple(training.benchmark_tasks), training.benchmark_path)
    elif training.benchmark_every is not None and settings.data_path is not None:
        raise UserError(
            "--training.benchmark_every: the sentence benchmarks are made from the held-out text of --corpus, and this run "
            "has only shards (--data-path): name --training.benchmark_tasks of the harness"
        )


class Monitor:
    """Watches one run, as a context manager around it. The trainer reports to it."""

    def __init__(
        self,
        settings: PretrainSettings,
        run_dir: Path,
        strategy: Strategy,
        model: Any,
        tokenizer: Any,
        state: TrainingState,
    ):
        self.settings, self.training, self.run_dir = settings, settings.training, run_dir
        self.strategy, self.model, self.tokenizer, self.state = strategy, model, tokenizer, state
        self.profiler = Profiler(self.training, run_dir / "profile", strategy.device, strategy.rank)
        self.samples_file: MetricsFile | None = None
        if self.training.sample_every is not None:
            self.samples_file = MetricsFile(
                run_dir / "samples.jsonl", state.step, state.data_position.row, write=strategy.is_main_process
            )

    def __enter__(self) -> Self:
        if self.strategy.is_main_process:
            self.trackers = Trackers(self.strategy.accelerator, self.settings, self.run_dir, self.state.step)
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.finish()
        if self.strategy.is_main_process:
            self.trackers.finish()

    def log(self, record: dict[str, Any]) -> None:
        """Send a record of metrics.jsonl to the trackers."""
        self.trackers.log(record)

    @property
    def evaluation_due(self) -> bool:
        """Whether samples or benchmarks are due after this step. The trainer saves first, since they may fail."""
        return self._is_due(self.training.sample_every) or self._is_due(self.training.benchmark_every)

    def evaluate(self, metrics: MetricsFile) -> None:
        """Generate the samples and run the benchmarks that are due, and write the scores to ``metrics`` as an event.

        If they fail, that is an event too, and training continues. All ranks compute the same, since the model may be
        sharded over them.
        """
        if self._is_due(self.training.sample_every):
            self._run("samples", self._generate_samples, metrics)
        if self._is_due(self.training.benchmark_every):
            self._run("benchmark", self._run_benchmark, metrics)

    def _is_due(self, every: int | None) -> bool:
        step = self.state.step
        return every is not None and (step % every == 0 or step == self.settings.max_steps)

    def _run(self, name: str, evaluation: Callable[[Any], dict[str, Any]], metrics: MetricsFile) -> None:
        event = {"event": name, "step": self.state.step, "row": self.state.data_position.row}
        model = self.strategy.unwrap(self.model)
        try:
            with evaluation_mode(model), autocast(self.strategy.device.type, self.state.precision):
                result = evaluation(model)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported and the run continues)
            result = {"event": f"{name} failed", "reason": f"{type(error).__name__}: {error}"}
            print0(f"  step {self.state.step:>5,}  {result['event']}, training continues: {result['reason']}")
        self.strategy.release_gathered_weights(self.model)
        if result:
            metrics.write(event | result)

    def _generate_samples(self, model: Any) -> dict[str, Any]:
        from scratch_gpt.inference.generate import generate_samples

        assert self.samples_file is not None
        step = self.state.step
        texts = generate_samples(model, self.tokenizer, self.training.sample_prompts or [""], self.settings.seed)
        for text in texts:
            print0(f"  step {step:>5,}  > {printable(text)}")
        self.samples_file.write({"step": step, "samples": texts})
        return {}

    def _run_benchmark(self, model: Any) -> dict[str, Any]:
        scores = self._score(model)
        for task, metrics in scores.items():
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print0(f"  step {self.state.step:>5,}  {task}: {values}")
        return {"scores": scores}

    def _score(self, model: Any) -> dict[str, dict[str, float]]:
        """Scores by task and metric."""
        from scratch_gpt.evaluation.builtin_tasks import make_questions_for
        from scratch_gpt.evaluation.lm_eval import run_named_tasks, run_tasks

        training, limit = self.training, self.training.benchmark_limit
        if training.benchmark_tasks:
            names = tuple(training.benchmark_tasks)
            return run_named_tasks(model, self.tokenizer, names, training.benchmark_path, limit)
        _, held_out, _ = split_documents(self.settings)
        tasks = make_questions_for(model, self.tokenizer, held_out, limit, self.settings.seed)
        if not tasks:
            raise ValueError("the held-out text is too short to make questions from")
        with tempfile.TemporaryDirectory() as folder:
            scores = run_tasks(model, self.tokenizer, tasks, Path(folder))
        return {score.task: {score.metric: score.value, f"{score.metric}_stderr": score.stderr} for score in scores}


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode and all random number generators afterwards.

    Compiled blocks run eagerly: other shapes would compile them again, and could change the graph that training uses.
    """
    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        model.train(was_training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
