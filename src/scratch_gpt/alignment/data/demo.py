"""The demonstration data of all recipes, `--data bundled`: requests for the next sentence of a text, from the bundled novels.

The chosen completion is the sentence that follows in the novel, the rejected one is a sentence from elsewhere in the novels.
"""

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

from scratch_gpt.data.sources import bundled_corpus, read_documents

NAME = "bundled"
INSTRUCTION = "Continue this text with one sentence."
MIN_CHARACTERS, MAX_CHARACTERS = 30, 160
"""Length of a sentence."""


def demo_rows() -> list[dict[str, Any]]:
    """Return rows with `prompt`, `chosen` and `rejected`, all messages, in the same order each time."""
    pairs = list(sentence_pairs())
    rng = random.Random(0)
    rng.shuffle(pairs)
    others = [following for _, following in pairs]
    rng.shuffle(others)
    return [
        {
            "prompt": [{"role": "user", "content": f"{INSTRUCTION}\n\n{sentence}"}],
            "chosen": [{"role": "assistant", "content": following}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        for (sentence, following), other in zip(pairs, others, strict=True)
        if following != other
    ]


def sentence_pairs() -> Iterator[tuple[str, str]]:
    """Yield neighboring sentences of the training text that are on the same line and of moderate length."""
    sentences: list[str] = []
    for document in read_documents([bundled_corpus("train")]):
        for line in document.splitlines():
            sentences += [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", line)]
            sentences.append("")  # separates paragraphs
    for sentence, following in itertools.pairwise(sentences):
        if all(MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS for text in (sentence, following)):
            yield sentence, following


def complete_sentence(completions: list[Any], **columns: Any) -> list[float]:
    """Reward for trying out reinforcement learning: 1 for one complete sentence, 1/n for n of them, 0 if the last is cut off."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [_sentence_score(text.strip()) for text in texts]


def _sentence_score(text: str) -> float:
    num_ends = len(re.findall(r"[.!?]", text))
    if not num_ends or not re.search(r"[.!?][\"')]?$", text):
        return 0.0
    return 1.0 / num_ends
