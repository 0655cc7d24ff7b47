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
from scratch_gpt.training.trainer import Trainer
from tests.distributed.program import run_all

SLOW_DISK = "SLOW_DISK"
name, rank, step, runs = sys.argv[1:]


def strikes(trainer, fault, its_step):
    """Whether it is time for a ``fault`` of this process; notes its number."""
    mark = Path(trainer.run_dir) / "pid"
    here = trainer.run_dir.name == "struck" and trainer.strategy.rank == int(rank)
    if fault == name and here and its_step == int(step) and not mark.exists():
        mark.write_text(str(os.getpid()))
        return True
    return False


def forward_backward(trainer, data, original=Trainer.forward_backward):
    if name != SLOW_DISK and strikes(trainer, name, trainer.state.step + 1):
        os.kill(os.getpid(), signal.Signals[name])
    return original(trainer, data)


def read_steps(trainer, original=Trainer.read_steps):
    for its_step, data in enumerate(original(trainer), start=trainer.state.step + 1):
        if strikes(trainer, SLOW_DISK, its_step):
            time.sleep(1000)
        yield data


Trainer.forward_backward, Trainer.read_steps = forward_backward, read_steps
leave(run_all(json.loads(runs)))
