"""Settings of `generate`."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class GenerateSettings:
    """Continue a prompt."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    prompt: str = "It was"
    """Text to continue."""
    max_new_tokens: int = 120
    """Length of each continuation, in tokens."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 50
    """Sample from the k likeliest tokens only; 0: from all."""
    num_return_sequences: int = 1
    """How many continuations."""
    seed: int = 1337
    """Decides the samples."""
