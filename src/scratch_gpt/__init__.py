"""scratch_gpt: from raw text to a GPT that is a Hugging Face model from the first step.

``import scratch_gpt`` is enough for ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ... to know the model type.
Torch and transformers themselves are imported only when something needs them, so that ``--help`` answers at once.
"""

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

_PUBLIC = {
    "ScratchGPTConfig": "scratch_gpt.model",
    "ScratchGPTModel": "scratch_gpt.model",
    "ScratchGPTForCausalLM": "scratch_gpt.model",
    "ScratchGPTForSequenceClassification": "scratch_gpt.model",
    "ScratchGPTForTokenClassification": "scratch_gpt.model",
    "ScratchGPTPreTrainedModel": "scratch_gpt.model",
}
__all__ = ["__version__", *_PUBLIC]


def _register(_module: Any) -> None:
    importlib.import_module("scratch_gpt.model")


# Runs at once when transformers' Auto classes are loaded already, else in the moment in which they are.
wrapt.register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
wrapt.register_post_import_hook(_register, "transformers.models.auto.modeling_auto")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
