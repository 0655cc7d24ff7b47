"""Settings of `evaluate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass
class EvaluateSettings:
    """Measure a saved model: validation bits per byte and a sentence benchmark through the lm-eval harness."""

    POSITIONAL: ClassVar[str] = "model"
    model: str = "runs/quickstart/final"
    """Folder of a saved model (or a name on the Hub)."""
    text: str | None = None
    """Text file to measure on; left out: the held-out part of the bundled corpus."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    limit: int = 200
    """Questions per task."""
    seed: int = 1337
    """Decides how the questions are drawn."""
    output: str | None = None
    """Write the results to this JSON file as well."""
