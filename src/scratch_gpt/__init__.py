"""scratch_gpt: from raw text to a GPT that is a Hugging Face model from the first step.

``import scratch_gpt`` is enough for ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ... to know the model type.
"""

import importlib
import sys
from pathlib import Path
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


# The command line answers --help at once: there, torch and transformers wait until a verb needs them. While a module
# runs by `python -m`, its packages are imported with "-m" in this place.
if Path(sys.argv[0] if sys.argv else "").name not in ("scratch-gpt", "-m"):
    importlib.import_module("scratch_gpt.model")
