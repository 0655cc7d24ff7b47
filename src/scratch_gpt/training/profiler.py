"""Profile a few steps with torch's profiler, and record a snapshot of GPU memory."""

from pathlib import Path
from typing import Any

import torch

from scratch_gpt.config import TrainingSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError

MAX_TABLE_ROWS = 15
"""Operators in the printed table."""


def check_profiler(training: TrainingSettings, device: torch.device) -> None:
    """Raise a UserError for an invalid range of steps, or for a memory snapshot without a CUDA GPU."""
    steps = training.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f"--training.profile_steps is {steps}: give the first and the last step, such as [10, 13]")
    if training.memory_snapshot_step is not None and device.type != "cuda":
        raise UserError(
            f"--training.memory_snapshot_step needs a CUDA GPU, and this run is on {device.type}: the snapshot is of "
            "CUDA's allocator. `scratch-gpt plan` estimates memory, and --training.profile_steps measures time"
        )


class Profiler:
    """Writes one file per rank to ``folder``: a trace of the profiled steps, and a memory snapshot."""

    def __init__(self, training: TrainingSettings, folder: Path, device: torch.device, rank: int):
        self.first_step, self.last_step = training.profile_steps or (0, 0)
        self.snapshot_step = training.memory_snapshot_step
        self.folder, self.device, self.rank = folder, device, rank
        self.profiler: Any = None

    def before_step(self, step: int) -> None:
        if self.profiler is None and self.first_step <= step <= self.last_step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self.profiler.start()
        if step == self.snapshot_step:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def after_step(self, step: int) -> None:
        if self.profiler is not None and step >= self.last_step:
            self.finish()
        if step == self.snapshot_step:
            self.folder.mkdir(exist_ok=True)
            target = self.folder / f"memory-step-{step}-process-{self.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(target))
            torch.cuda.memory._record_memory_history(enabled=None)
            print0(f"profile    {target}: open it in https://pytorch.org/memory_viz")
            self.snapshot_step = None  # a skipped step is retried under the same number

    def finish(self) -> None:
        """Stop profiling and write the trace; does nothing if no profile is under way."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.folder.mkdir(exist_ok=True)
        target = self.folder / f"steps-{self.first_step}-{self.last_step}-process-{self.rank}.json.gz"
        self.profiler.export_chrome_trace(str(target))
        sort_by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=sort_by, row_limit=MAX_TABLE_ROWS, max_name_column_width=50)
        print0(table)
        print0(f"profile    {target}: open it in https://ui.perfetto.dev")
        self.profiler, self.last_step = None, 0
