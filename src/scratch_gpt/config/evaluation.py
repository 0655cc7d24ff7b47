"""Settings of `evaluate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from scratch_gpt.config.fields import setting


@dataclass
class EvaluateSettings:
    """Evaluate a saved model: bits per byte on a text, and a sentence benchmark with lm-eval."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    text: str | None = None
    """Text file to evaluate on. Default: the held-out part of the bundled corpus."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: stop with an error (strict), or replace them by U+FFFD."""
    limit: int = setting(200, more_than=0)
    """Number of questions per task."""
    seed: int = setting(1337, at_least=0)
    """Seed of the choice of questions."""
    output: str | None = None
    """Also write the results to this JSON file."""
