"""Two small benchmarks made from held-out text, for models that are minutes old.

next_sentence: which of four sentences comes next? The other three stand elsewhere in the text (chance: 25 %).
word_order: which of two is the sentence, and which has its words shuffled? (chance: 50 %).
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHORTEST, LONGEST = 30, 250
"""Characters of a sentence that is asked about."""
CONTEXT_SENTENCES = 3
WRONG_CHOICES = 3
FEWEST_QUESTIONS = 10
"""With fewer than this, an accuracy says nothing."""

# A sentence ends at . ! or ? (and closing quotes), or at the end of its line.
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'”’)]*|$)", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    context: str
    choices: list[str]
    answer: int
    """Index of the true choice."""


def sentences_of(documents: Iterable[str]) -> list[str]:
    found = (match.group().strip() for document in documents for match in _SENTENCE.finditer(document))
    return [sentence for sentence in found if sentence]


def questions(
    documents: Iterable[str], limit: int, seed: int, fits: Callable[[str], bool] = lambda choice: True
) -> dict[str, list[Question]]:
    """Up to ``limit`` questions per task; none at all where the text is too short to ask :data:`FEWEST_QUESTIONS`.

    ``fits`` says whether a choice is short enough for the model.
    """
    sentences = sentences_of(documents)
    rng = random.Random(seed)
    usable = [
        index
        for index, sentence in enumerate(sentences)
        if SHORTEST <= len(sentence) <= LONGEST and " " in sentence and fits(sentence)
    ]
    rng.shuffle(usable)
    tasks: dict[str, list[Question]] = {"next_sentence": [], "word_order": []}
    for index in usable:
        context = " ".join(sentences[max(0, index - CONTEXT_SENTENCES) : index])
        # Neighbours would be half right: the wrong sentences come from elsewhere.
        elsewhere = [other for other in usable if abs(other - index) > 2 * CONTEXT_SENTENCES]
        if context and len(elsewhere) >= WRONG_CHOICES and len(tasks["next_sentence"]) < limit:
            wrong = [sentences[other] for other in rng.sample(elsewhere, WRONG_CHOICES)]
            tasks["next_sentence"].append(_ask(context, sentences[index], wrong, rng))
        words = sentences[index].split(" ")
        shuffled = rng.sample(words, len(words))
        if shuffled != words and fits(" ".join(shuffled)) and len(tasks["word_order"]) < limit:
            tasks["word_order"].append(_ask("", sentences[index], [" ".join(shuffled)], rng))
    return {name: asked for name, asked in tasks.items() if len(asked) >= FEWEST_QUESTIONS}


def questions_for(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], limit: int, seed: int
) -> dict[str, list[Question]]:
    """:func:`questions` whose choices fit into the model's context."""
    backend = tokenizer.backend_tokenizer
    longest = model.config.max_position_embeddings - 2  # room for the token before, and for a leading space
    return questions(documents, limit, seed, fits=lambda choice: len(backend.encode(choice)) <= longest)


def _ask(context: str, true: str, wrong: list[str], rng: random.Random) -> Question:
    answer = rng.randrange(len(wrong) + 1)
    return Question(context, wrong[:answer] + [true] + wrong[answer:], answer)
