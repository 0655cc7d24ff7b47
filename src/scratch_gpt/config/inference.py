"""Settings of `generate`."""

from dataclasses import dataclass
from typing import ClassVar

from scratch_gpt.config.fields import setting


@dataclass
class GenerateSettings:
    """Continue a prompt with a saved model."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    prompt: str = "It was"
    """Text to continue."""
    max_new_tokens: int = setting(120, more_than=0)
    """Length of each continuation, in tokens."""
    temperature: float = setting(0.8, at_least=0)
    """Sampling temperature; 0: always the most likely token."""
    top_k: int = setting(50, at_least=0)
    """Sample from the k most likely tokens only; 0: from all."""
    num_return_sequences: int = setting(1, more_than=0)
    """Number of continuations."""
    seed: int = setting(1337, at_least=0)
    """Seed of sampling."""
