"""Small data for a first try of every stage, made from the bundled novels: someone asks for the next sentence of a text.

The answer is the sentence that follows there; the worse side of a pair, one from elsewhere in the novels.
"""

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

from scratch_gpt.data.sources import bundled_corpus, read_documents

NAME = "bundled"
QUESTION = "Continue this text with one sentence."
SHORTEST, LONGEST = 30, 160
"""Characters of a sentence."""


def sentences() -> Iterator[tuple[str, str]]:
    """Neighbours in the training text, each of one line and of readable length."""
    found: list[str] = []
    for document in read_documents([bundled_corpus("train")]):
        for line in document.splitlines():
            found += [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", line)]
            found.append("")  # no neighbours over the end of a paragraph
    for before, after in itertools.pairwise(found):
        if all(SHORTEST <= len(text) <= LONGEST for text in (before, after)):
            yield before, after


def bundled_rows() -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected`, all messages, in an order that is the same each time."""
    neighbours = list(sentences())
    rng = random.Random(0)
    rng.shuffle(neighbours)
    others = [after for _, after in neighbours]
    rng.shuffle(others)
    return [
        {
            "prompt": [{"role": "user", "content": f"{QUESTION}\n\n{before}"}],
            "chosen": [{"role": "assistant", "content": after}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        for (before, after), other in zip(neighbours, others, strict=True)
        if after != other
    ]


def whole_sentence(completions: list[Any], **columns: Any) -> list[float]:
    """A reward for trying out reinforcement learning: 1 for one sentence that comes to its end, less for more or none."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [_sentence_score(text.strip()) for text in texts]


def _sentence_score(text: str) -> float:
    ends = len(re.findall(r"[.!?]", text))
    if not ends or not re.search(r"[.!?][\"')]?$", text):
        return 0.0
    return 1.0 / ends
