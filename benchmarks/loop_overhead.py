"""What the training loop adds to the bare forward, backward and optimizer step.

    python benchmarks/loop_overhead.py                                      # the quickstart's model and batch, eager
    python benchmarks/loop_overhead.py --model.preset modern-30m --training.context_length 256

Takes any setting of `scratch-gpt pretrain`. One process alternates between steps of the loop and bare steps, on the same
model with the same optimizer, on batches of the same size, with nothing else running. A step of the loop also waits for
its data, clips the gradients, checks the loss, and writes its record; the bare step repeats one batch. Prints the median
over the pairs of the ratio of their times; "with clipping" compares with a bare step that clips as well, as any recipe does.
"""

import statistics
import sys
import tempfile
import time

import torch

from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import PretrainSettings, parse_settings
from scratch_gpt.data.loader import StepData
from scratch_gpt.training.pretrain import pretrain
from scratch_gpt.training.trainer import Trainer, TrainerCallback

PAIRS, WARM_UP = 100, 10


class MeasureOverhead(TrainerCallback):
    """Takes bare steps between those of the loop, until there are enough pairs."""

    def __init__(self) -> None:
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.clipping: list[float] = []
        self.data: StepData | None = None
        self.loop_started: float | None = None

    def on_step_begin(self, trainer: Trainer, data: StepData) -> None:
        if self.data is None:
            self.data = data

    def on_step_end(self, trainer: Trainer, record: dict) -> None:
        if self.loop_started is not None:
            self.loop.append(now() - self.loop_started)
            self.clipping.append(self.bare_step(trainer, clip=True))
        if len(self.loop) == WARM_UP + PAIRS:
            self.report()
            raise SystemExit
        self.bare.append(self.bare_step(trainer, clip=False))
        self.loop_started = now()

    def bare_step(self, trainer: Trainer, clip: bool) -> float:
        """Seconds that it takes."""
        assert self.data is not None
        started = now()
        for batch in self.data.batches:
            with autocast(trainer.strategy.device.type, trainer.state.precision):
                loss = trainer.model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    shift_labels=batch.targets,
                    num_items_in_batch=self.data.num_targets,
                ).loss
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.training.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return now() - started

    def report(self) -> None:
        loop, bare, clipping = (times[WARM_UP:] for times in (self.loop, self.bare, self.clipping))
        medians = [1e3 * statistics.median(times) for times in (bare, clipping, loop)]
        print("\nbare step {:.2f} ms, with clipping {:.2f} ms, loop {:.2f} ms (medians)".format(*medians))
        ratios = [
            statistics.median(one / other for one, other in zip(loop, times, strict=True)) for times in (bare, clipping)
        ]
        print(
            f"loop / bare {ratios[0]:.4f}, loop / bare with clipping {ratios[1]:.4f} (medians of {len(loop)} pairs)",
            flush=True,
        )


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--run-dir", f"{folder}/run", "--max-steps", "1000000", "--training.save_every", "1000000"]
        fixed += ["--training.eval_every", "1000000", "--training.compile", "off", "--training.trackers", "[]"]
        settings = parse_settings(PretrainSettings, [*fixed, *sys.argv[1:]], "loop_overhead.py")
        pretrain(settings, callbacks=[MeasureOverhead()])
