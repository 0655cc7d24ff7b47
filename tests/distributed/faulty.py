"""`program.py`, in which one process of the run in a folder "struck" sends itself a signal in the middle of a step, once.

python -m tests.distributed.faulty SIGNAL RANK STEP RUNS
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from scratch_gpt.cli import leave
from scratch_gpt.training.trainer import Loop
from tests.distributed.program import run_all

SLOW_DISK = "SLOW_DISK"
name, rank, step, runs = sys.argv[1:]


def strikes(loop, fault, its_step):
    """Whether it is time for a ``fault`` of this process; notes its number."""
    mark = Path(loop.run_dir) / "pid"
    here = loop.run_dir.name == "struck" and loop.layout.rank == int(rank)
    if fault == name and here and its_step == int(step) and not mark.exists():
        mark.write_text(str(os.getpid()))
        return True
    return False


def forward_backward(loop, data, original=Loop.forward_backward):
    if name != SLOW_DISK and strikes(loop, name, loop.state.step + 1):
        os.kill(os.getpid(), signal.Signals[name])
    return original(loop, data)


def read_steps(loop, original=Loop._read_steps):
    for its_step, data in enumerate(original(loop), start=loop.state.step + 1):
        if strikes(loop, SLOW_DISK, its_step):
            time.sleep(1000)
        yield data


Loop.forward_backward, Loop._read_steps = forward_backward, read_steps
leave(run_all(json.loads(runs)))
