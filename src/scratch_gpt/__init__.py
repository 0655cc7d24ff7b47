"""scratch_gpt: from raw text to a GPT that is a Hugging Face model from the first step.

``import scratch_gpt`` is enough for ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ... to know the model type.
Torch and transformers themselves are imported only when something needs them, so that ``--help`` answers at once.
"""

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
    "__version__",
]


def _register(_module: Any) -> None:
    importlib.import_module("scratch_gpt.model")


# Runs at once when transformers' Auto classes are loaded already, else in the moment in which they are.
wrapt.register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
wrapt.register_post_import_hook(_register, "transformers.models.auto.modeling_auto")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("scratch_gpt.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
