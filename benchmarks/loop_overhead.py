"""What the training loop adds to the bare forward, backward and optimizer step.

    python benchmarks/loop_overhead.py                                      # the quickstart's model and batch, eager
    python benchmarks/loop_overhead.py --model.preset modern-30m --training.context_length 256

Takes any setting of `scratch-gpt pretrain`. One process takes a step of the loop and a bare step in turn, on the same model
with the same optimizer, rows of the same length and nothing else running. The loop's step also waits for its rows, clips the
gradients, judges the step, and writes its line; the bare step uses one batch again and again. Printed is the median over
the pairs of the ratio of their times, and of "with clipping", where the bare step clips as well, for that is arithmetic
which any recipe has.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import scratch_gpt.training.pretrain
from scratch_gpt.compute.precision import autocast
from scratch_gpt.config import PretrainSettings, parse_settings
from scratch_gpt.data.loader import Prefetcher
from scratch_gpt.training.stop import StopRequest
from scratch_gpt.training.trainer import Trainer

PAIRS, WARM_UP = 100, 10


class MeasuredLoop(Trainer):
    def run(self) -> None:
        device = self.strategy.device.type
        with self.observer, self.saver, StopRequest() as stop, Prefetcher(self._read_steps()) as reader:
            data = next(reader)

            def bare(clip: bool) -> None:
                for batch in data.batches:
                    with autocast(device, self.state.precision):
                        loss = self.model(
                            input_ids=batch.input_ids,
                            position_ids=batch.position_ids,
                            shift_labels=batch.targets,
                            num_items_in_batch=data.num_targets,
                        ).loss
                    loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()

            rounds = [
                (timed(lambda: bare(False)), timed(lambda: self._train_step(reader, stop)), timed(lambda: bare(True)))
                for _ in range(WARM_UP + PAIRS)
            ][WARM_UP:]
        plain, trainer, clipping = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"\nbare step {1e3 * plain:.2f} ms, with clipping {1e3 * clipping:.2f} ms, loop {1e3 * trainer:.2f} ms (medians)"
        )
        ratios = statistics.median(one[1] / one[0] for one in rounds), statistics.median(o[1] / o[2] for o in rounds)
        print(f"loop / bare {ratios[0]:.4f}, loop / bare with clipping {ratios[1]:.4f} (medians of {PAIRS} pairs)")
        raise SystemExit


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    scratch_gpt.training.pretrain.Loop = MeasuredLoop  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--run-dir", f"{folder}/run", "--max-steps", "1000000", "--training.save_every", "1000000"]
        fixed += ["--training.eval_every", "1000000", "--training.compile", "off", "--training.trackers", "[]"]
        settings = parse_settings(PretrainSettings, [*fixed, *sys.argv[1:]], "loop_overhead.py")
        scratch_gpt.training.pretrain.pretrain_command(settings)
