"""scratch_gpt: from raw text to a GPT that is a Hugging Face model from the first step.

``import scratch_gpt`` is enough for ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ... to know the model type.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("scratch_gpt.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _runs_as_command() -> bool:
    """Whether this process is ``scratch-gpt`` or ``python -m scratch_gpt``, or one of its worker processes.

    For ``-m``, Python imports this package before ``__main__`` has a file.
    """
    options = sys.orig_argv
    by_module = "-m" in options and options[options.index("-m") + 1 :][:1] == [__name__]
    return "scratch_gpt_command" in sys.modules or (by_module and not hasattr(sys.modules["__main__"], "__file__"))


# The command line answers --help at once; its commands import the model when they need it.
if not _runs_as_command():
    importlib.import_module("scratch_gpt.model")
