"""Settings of `export` and `import`."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass
class ExportSettings:
    """Write a saved model as a stock class of transformers, for tools that do not know ours: same logits."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model; may stand alone after the verb."""
    to: Literal["auto", "gpt2", "llama", "qwen3", "qwen2", "mistral", "smollm3"] = "auto"
    """The architecture; auto: the first that can express the model."""
    output: str = "runs/exported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both afterwards, one after the other, and compare their logits."""


@dataclass
class ImportSettings:
    """Read a saved GPT-2, Llama, Mistral, Qwen2, Qwen3 or SmolLM3 as a ScratchGPT model: same logits."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/exported"
    """Folder of the saved model; may stand alone after the verb."""
    output: str = "runs/imported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both afterwards, one after the other, and compare their logits."""
