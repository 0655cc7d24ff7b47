"""Processes that are killed, or meet a full disk, at their n-th file operation.

They are forked from a server that has imported everything, so that a test can afford many.
"""

import contextlib
import errno
import importlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from scratch_gpt.training import pretrain
from scratch_gpt.training.trainer import TrainerCallback

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "scratch_gpt.training.pretrain", "tests.training.faults"])
NEVER = 10**9
KILLED = -signal.SIGKILL


@dataclass
class Faults(TrainerCallback):
    """Faults in a process, from its n-th file operation on or in its n-th training step."""

    kill_at: int = NEVER
    kill_in_step: int = NEVER
    full_from: int = NEVER
    """From this operation on, no space is left on the disk."""
    operations: int = 0
    """File operations so far."""
    steps: int = 0
    """Training steps so far."""

    def operation(self, needs_space):
        self.operations += 1
        if self.operations >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if needs_space and self.operations >= self.full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, event, details):
        if event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR):
            self.operation(needs_space=True)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.operation(needs_space=event == "os.mkdir")

    def install(self):
        sys.addaudithook(self.audit)
        os.fsync = lambda descriptor: self.operation(needs_space=True)  # a killed process loses no cached writes
        for name in ("scratch_gpt.training.checkpoint.save_file", "transformers.modeling_utils.safe_save_file"):
            self._wrap(name, self._save_file)
        pretrain.pretrain_command = lambda settings: pretrain.pretrain(settings, callbacks=[self])

    def _wrap(self, name, wrapper):
        module, _, attribute = name.rpartition(".")
        original = getattr(importlib.import_module(module), attribute)
        setattr(sys.modules[module], attribute, lambda *args, **more: wrapper(original, *args, **more))

    def _save_file(self, original, tensors, file, **more):
        """safetensors writes without audit events, so this does: half a file, an operation, the full file."""
        original(tensors, file, **more)
        os.truncate(file, os.path.getsize(file) // 2)
        self.operation(needs_space=True)
        original(tensors, file, **more)

    def on_loss(self, trainer, data, loss):
        self.steps += 1
        if self.steps >= self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def call(function, *arguments, faults=None):
    """Call ``function`` in a process of its own with these faults: (exit code or minus a signal, file operations)."""
    operations = SERVER.Value("q")
    process = SERVER.Process(target=_call, args=(function, arguments, faults or Faults(), operations))
    process.start()
    process.join(120)
    assert process.exitcode is not None, f"{function.__name__} hangs"
    return process.exitcode, operations.value


def _call(function, arguments, faults, operations):
    faults.install()
    code = function(*arguments)
    operations.value = faults.operations
    sys.exit(code)


def command(arguments, output):
    """Run `scratch-gpt` with these arguments, and write what it prints to the file ``output``."""
    from scratch_gpt.cli import main

    with Path(output).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return main(arguments)
