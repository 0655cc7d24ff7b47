"""Check whether a text does what a request asks: a few lines of Python for each demand, no model.

A request's demands are columns of its line in `requests_*.jsonl`; 0 and empty mean "not asked":

    words        ["lantern", "river"]   each is in the text, as a separate word
    hero         "Luna"                 this name is in the text
    begins_with  "One stormy night"     the text begins with these words
    ends_with    "smile"                its last word
    sentences    3                      the number of its sentences

`demands_met` is a reward for `scratch-gpt ppo` and `grpo` (`--reward examples.stories.checks:demands_met`, from the
project's root); `obeyed` is the success rate that the example reports.
"""

import re
from collections.abc import Sequence
from typing import Any

DEMANDS = ("words", "hero", "begins_with", "ends_with", "sentences")
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# A period, question or exclamation mark and an optional closing quotation mark, before a capital letter or the end.
SENTENCE_END = re.compile(r"[.!?…]+[\"”’')]*(?=\s+[\"“‘(]*[A-Z]|\s*$)")
TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St)\.")


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return [word.lower().replace("’", "'") for word in WORD.findall(text)]


def count_sentences(text: str) -> int:
    """Count the sentences of a text, including one that breaks off at the end."""
    return len([sentence for sentence in SENTENCE_END.split(TITLES.sub("", text)) if sentence.strip()])


def fraction_of_words(text: str, wanted: Sequence[str]) -> float:
    """Return the fraction of the ``wanted`` words (at least one) that are in the text."""
    found = set(words(text))
    return sum(word.lower() in found for word in wanted) / len(wanted)


def begins_with(text: str, beginning: str) -> bool:
    expected = words(beginning)
    return words(text)[: len(expected)] == expected


def ends_with(text: str, word: str) -> bool:
    return words(text)[-1:] == [word.lower()]


def scores(text: str, request: dict[str, Any]) -> dict[str, float]:
    """Score each demand of the request by name: the fraction of the words, 0 or 1 for the other demands."""
    found: dict[str, float] = {}
    if request["words"]:
        found["words"] = fraction_of_words(text, request["words"])
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
    """Return the text of a completion, which may be text or messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def demands_met(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward: the mean score of a request's demands, 0 to 1."""
    rewards = []
    for row, completion in enumerate(completions):
        met = scores(text_of(completion), {name: columns[name][row] for name in DEMANDS})
        rewards.append(sum(met.values()) / len(met))
    return rewards


def obeyed(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Success: 1 if every demand is fully met, else 0."""
    return [float(reward == 1) for reward in demands_met(completions, **columns)]
