"""The console command ``scratch-gpt``, and the start of the worker processes of `data prepare`.

A separate package because its import comes first: while it is loaded, ``import scratch_gpt`` does not import torch and
transformers to register the model. That takes seconds and half a gigabyte, which ``--help`` and tokenizing do not need.
Commands that load a model import ``scratch_gpt.model`` themselves.
"""

import importlib
import pickle
from typing import NoReturn


def command() -> NoReturn:
    """Run the command line of this process."""
    from scratch_gpt.cli import command as run_command

    run_command()


def start_worker(function: str, arguments: bytes) -> None:
    """Call ``function``, given as "module:name", with pickled ``arguments``: the initializer of a spawned process.

    Names and bytes instead of objects, so that nothing of scratch_gpt is imported before this package.
    """
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(*pickle.loads(arguments))
