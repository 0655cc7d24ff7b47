"""A look inside a few steps: torch's profiler, and what fills a GPU's memory."""

from pathlib import Path
from typing import Any

import torch

from scratch_gpt.config import TrainingSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError

ROWS = 15
"""Operators in the printed table."""


def check_profiler(training: TrainingSettings, device: torch.device) -> None:
    """Raises a UserError for a window that is none, or for a memory snapshot of anything but a CUDA GPU."""
    window = training.profile_steps
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise UserError(f"--training.profile_steps is {window}: give the first and the last step, such as [10, 13]")
    if training.memory_snapshot_step is not None and device.type != "cuda":
        raise UserError(
            f"--training.memory_snapshot_step needs a CUDA GPU, and this run is on {device.type}: the snapshot is of "
            "CUDA's allocator. `scratch-gpt plan` says what memory is for, and profile_steps what takes time"
        )


class Profiler:
    """Writes ``run_dir/profile/``, a file for each process."""

    def __init__(self, training: TrainingSettings, folder: Path, device: torch.device, process: int):
        self.first, self.last = training.profile_steps or (0, 0)
        self.snapshot_step = training.memory_snapshot_step
        self.folder, self.device, self.process = folder, device, process
        self.profiler: Any = None

    def before_step(self, step: int) -> None:
        if self.profiler is None and self.first <= step <= self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self.profiler.start()
        if step == self.snapshot_step:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def after_step(self, step: int) -> None:
        if self.profiler is not None and step >= self.last:
            self.finish()
        if step == self.snapshot_step:
            self.folder.mkdir(exist_ok=True)
            target = self.folder / f"memory-step-{step}-process-{self.process}.pickle"
            torch.cuda.memory._dump_snapshot(str(target))
            torch.cuda.memory._record_memory_history(enabled=None)
            print0(f"profile    {target}: drop it on https://pytorch.org/memory_viz")
            self.snapshot_step = None  # a step that is not taken is tried again, with the same number

    def finish(self) -> None:
        """End the window where it is, and write what it saw; nothing to do outside of one."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.folder.mkdir(exist_ok=True)
        target = self.folder / f"steps-{self.first}-{self.last}-process-{self.process}.json.gz"
        self.profiler.export_chrome_trace(str(target))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        print0(self.profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=50))
        print0(f"profile    {target}: open it in https://ui.perfetto.dev")
        self.profiler, self.last = None, 0
