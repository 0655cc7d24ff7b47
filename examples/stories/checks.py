"""Does a text do what the request asked? Each demand is checked by a few lines of Python, no model.

A request's demands are columns of its line in `requests_*.jsonl`; 0 and empty stand for "not asked":

    words        ["lantern", "river"]   each stands in the text, as a whole word
    hero         "Luna"                 so does this name
    begins_with  "One stormy night"     the text begins with these words
    ends_with    "smile"                its last word
    sentences    3                      it has this many

`demands_met` is a reward for the verbs `ppo` and `grpo` (`--reward examples.stories.checks:demands_met`, from the
project's root); `obeyed` is the success that the example reports.
"""

import re
from collections.abc import Sequence
from typing import Any

DEMANDS = ("words", "hero", "begins_with", "ends_with", "sentences")
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# A full stop, question or exclamation mark, and the quotation mark that may close after it, before a capital or the end.
SENTENCE_END = re.compile(r"[.!?…]+[\"”’')]*(?=\s+[\"“‘(]*[A-Z]|\s*$)")
TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St)\.")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower().replace("’", "'") for word in WORD.findall(text)]


def count_sentences(text: str) -> int:
    """How many sentences the text has; one that breaks off at the end counts as well."""
    return len([piece for piece in SENTENCE_END.split(TITLES.sub("", text)) if piece.strip()])


def share_of_words(text: str, wanted: Sequence[str]) -> float:
    """How many of the ``wanted`` words (at least one) stand in the text."""
    found = set(words(text))
    return sum(word.lower() in found for word in wanted) / len(wanted)


def begins_with(text: str, beginning: str) -> bool:
    expected = words(beginning)
    return words(text)[: len(expected)] == expected


def ends_with(text: str, word: str) -> bool:
    return words(text)[-1:] == [word.lower()]


def scores(text: str, request: dict[str, Any]) -> dict[str, float]:
    """Every demand of the request, and how far the text meets it: 0 to 1 for words, 0 or 1 for the others."""
    found: dict[str, float] = {}
    if request["words"]:
        found["words"] = share_of_words(text, request["words"])
    if request["hero"]:
        found["hero"] = float(request["hero"].lower() in words(text))
    if request["begins_with"]:
        found["begins_with"] = float(begins_with(text, request["begins_with"]))
    if request["ends_with"]:
        found["ends_with"] = float(ends_with(text, request["ends_with"]))
    if request["sentences"]:
        found["sentences"] = float(count_sentences(text) == request["sentences"])
    return found


def text_of(completion: Any) -> str:
    """A completion as text, whether it is text or messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def demands_met(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward: the mean over the demands of a request of how far each is met, 0 to 1."""
    rewards = []
    for row, completion in enumerate(completions):
        met = scores(text_of(completion), {name: columns[name][row] for name in DEMANDS})
        rewards.append(sum(met.values()) / len(met))
    return rewards


def obeyed(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Success: 1 where every demand is met in full, else 0."""
    return [float(reward == 1) for reward in demands_met(completions, **columns)]
