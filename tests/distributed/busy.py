"""`program.py`, in which the last collective of a run still goes on while each process, busy, frees what it had."""

import json
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator

from scratch_gpt.cli import leave
from tests.distributed.program import run_all


def end_training(accelerator, original=Accelerator.end_training):
    sys.setswitchinterval(1000)
    dist.all_reduce(torch.ones(50_000_000), async_op=True)
    original(accelerator)


Accelerator.end_training = end_training
leave(run_all(json.loads(sys.argv[1])))
