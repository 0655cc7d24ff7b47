"""Settings of `evaluate`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from scratch_gpt.config.fields import setting


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
    limit: int = setting(200, more_than=0)
    """Questions per task."""
    seed: int = setting(1337, at_least=0)
    """Decides how the questions are drawn."""
    output: str | None = None
    """Write the results to this JSON file as well."""
