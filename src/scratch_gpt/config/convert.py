"""Settings of `export` and `import`."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass
class ExportSettings:
    """Convert a saved model to a stock transformers class, with the same logits, for other tools."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model; may also be the first word after the command."""
    to: Literal["auto", "gpt2", "llama", "qwen3", "qwen2", "mistral", "smollm3"] = "auto"
    """Target architecture; auto: the first that can express the model."""
    output: str = "runs/exported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both models, one after the other, and compare their logits."""


@dataclass
class ImportSettings:
    """Convert a saved GPT-2, Llama, Mistral, Qwen2, Qwen3 or SmolLM3 to a ScratchGPT model, with the same logits."""

    POSITIONAL: ClassVar[str] = "path"
    path: str = "runs/exported"
    """Folder of the saved model; may also be the first word after the command."""
    output: str = "runs/imported"
    """Folder for the result; it must not exist."""
    verify: bool = True
    """Load both models, one after the other, and compare their logits."""
