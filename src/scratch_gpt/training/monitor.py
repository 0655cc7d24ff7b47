"""All that watches a run and must not change it: trackers, profiler, samples, benchmarks.

Looking at the model needs rooms that training does not know, so the verb hands the functions in (:class:`Looks`).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import PretrainSettings, TrainingSettings
from scratch_gpt.console import print0, printable
from scratch_gpt.distributed.strategy import Strategy
from scratch_gpt.training.checkpoint import TrainingState
from scratch_gpt.training.metrics import MetricsFile
from scratch_gpt.training.profiler import Profiler, check_profiler
from scratch_gpt.training.trackers import Trackers, resolve_trackers

Scores = dict[str, dict[str, float]]
"""By task and metric."""


@dataclass(frozen=True)
class Looks:
    """What looks at the model between two steps; both take (model, tokenizer)."""

    sample: Callable[[Any, Any], list[str]]
    """Texts that the model writes."""
    benchmark: Callable[[Any, Any], Scores]


def check_monitoring(training: TrainingSettings, device: torch.device) -> None:
    """Raises a UserError for what can be known to fail before a run starts."""
    resolve_trackers(training.trackers)
    check_profiler(training, device)


class Monitor:
    """Around a run as a context manager; the loop says what happens."""

    def __init__(
        self,
        settings: PretrainSettings,
        run_dir: Path,
        strategy: Strategy,
        model: Any,
        tokenizer: Any,
        state: TrainingState,
        looks: Looks | None,
    ):
        self.settings, self.training, self.run_dir = settings, settings.training, run_dir
        self.strategy, self.model, self.tokenizer = strategy, model, tokenizer
        self.state, self.looks = state, looks
        self.profiler = Profiler(self.training, run_dir / "profile", strategy.device, strategy.rank)
        self.samples: MetricsFile | None = None
        if self.training.sample_every is not None:
            self.samples = MetricsFile(
                run_dir / "samples.jsonl", state.step, state.cursor.row, write=strategy.is_main_process
            )

    def written(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.trackers.log(record)

    def __enter__(self) -> Self:
        if self.strategy.is_main_process:
            self.trackers = Trackers(self.strategy.accelerator, self.settings, self.run_dir, self.state.step)
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.finish()
        if self.strategy.is_main_process:
            self.trackers.finish()

    def due(self) -> bool:
        """Whether the model will be looked at now: it is saved before, for looking may fail."""
        return self._is_time(self.training.sample_every) or self._is_time(self.training.benchmark_every)

    def look(self, metrics: MetricsFile) -> None:
        """Samples and benchmarks that are due, the scores written to ``metrics`` as an event. What goes wrong in them is an event, and training goes on.

        Every process does the same, with the same numbers, since the model may be spread over them all.
        """
        if self._is_time(self.training.sample_every):
            self._look("samples", self._sample, metrics)
        if self._is_time(self.training.benchmark_every):
            self._look("benchmark", self._benchmark, metrics)

    def _is_time(self, every: int | None) -> bool:
        step = self.state.step
        return self.looks is not None and every is not None and (step % every == 0 or step == self.settings.max_steps)

    def _look(self, name: str, action: Callable[[Any], dict[str, Any]], metrics: MetricsFile) -> None:
        event = {"event": name, "step": self.state.step, "row": self.state.cursor.row}
        model = self.strategy.unwrap(self.model)
        try:
            with evaluation_mode(model), autocast(self.strategy.device.type, self.state.precision):
                seen = action(model)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is reported and the run goes on)
            seen = {"event": f"{name} failed", "reason": f"{type(error).__name__}: {error}"}
            print0(f"  step {self.state.step:>5,}  {seen['event']}, training goes on: {seen['reason']}")
        self.strategy.release_gathered_weights(self.model)
        if seen:
            metrics.write(event | seen)

    def _sample(self, model: Any) -> dict[str, Any]:
        assert self.looks is not None and self.samples is not None
        step, texts = self.state.step, self.looks.sample(model, self.tokenizer)
        for text in texts:
            print0(f"  step {step:>5,}  > {printable(text)}")
        self.samples.write({"step": step, "samples": texts})
        return {}

    def _benchmark(self, model: Any) -> dict[str, Any]:
        assert self.looks is not None
        scores = self.looks.benchmark(model, self.tokenizer)
        for task, metrics in scores.items():
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print0(f"  step {self.state.step:>5,}  {task}: {values}")
        return {"scores": scores}


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards mode and random numbers are what they were.

    Compiled blocks run eagerly: other shapes would have them compiled anew, and training may get another graph by it.
    """
    was_training = model.training
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        model.train(was_training)
        random.setstate(python)
        np.random.set_state(numpy)
