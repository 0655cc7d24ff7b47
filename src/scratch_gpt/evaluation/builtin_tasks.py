"""Two small multiple-choice benchmarks made from held-out text, for models that are minutes old.

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

MIN_CHARACTERS, MAX_CHARACTERS = 30, 250
"""Length of the sentences that become questions."""
NUM_CONTEXT_SENTENCES = 3
NUM_WRONG_CHOICES = 3
MIN_QUESTIONS = 10
"""With fewer questions, an accuracy is mostly noise."""

# A sentence ends at . ! or ? (and closing quotes), or at the end of its line.
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+[\"'”’)]*|$)", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    context: str
    choices: list[str]
    answer: int
    """Index of the correct choice."""


def split_sentences(documents: Iterable[str]) -> list[str]:
    """All sentences of ``documents``, in order."""
    found = (match.group().strip() for document in documents for match in _SENTENCE.finditer(document))
    return [sentence for sentence in found if sentence]


def make_questions(
    documents: Iterable[str], limit: int, seed: int, fits: Callable[[str], bool] = lambda choice: True
) -> dict[str, list[Question]]:
    """Up to ``limit`` questions per task. A task with fewer than :data:`MIN_QUESTIONS` is omitted.

    ``fits`` returns whether a choice is short enough for the model.
    """
    sentences = split_sentences(documents)
    rng = random.Random(seed)
    candidates = [
        index
        for index, sentence in enumerate(sentences)
        if MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS and " " in sentence and fits(sentence)
    ]
    rng.shuffle(candidates)
    tasks: dict[str, list[Question]] = {"next_sentence": [], "word_order": []}
    for index in candidates:
        context = " ".join(sentences[max(0, index - NUM_CONTEXT_SENTENCES) : index])
        # A neighboring sentence would be half right, so the wrong choices come from farther away.
        distant = [other for other in candidates if abs(other - index) > 2 * NUM_CONTEXT_SENTENCES]
        if context and len(distant) >= NUM_WRONG_CHOICES and len(tasks["next_sentence"]) < limit:
            wrong = [sentences[other] for other in rng.sample(distant, NUM_WRONG_CHOICES)]
            tasks["next_sentence"].append(_make_question(context, sentences[index], wrong, rng))
        words = sentences[index].split(" ")
        shuffled = rng.sample(words, len(words))
        if shuffled != words and fits(" ".join(shuffled)) and len(tasks["word_order"]) < limit:
            tasks["word_order"].append(_make_question("", sentences[index], [" ".join(shuffled)], rng))
    return {name: questions for name, questions in tasks.items() if len(questions) >= MIN_QUESTIONS}


def make_questions_for(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], limit: int, seed: int
) -> dict[str, list[Question]]:
    """:func:`make_questions` with choices that fit into the model's context."""
    backend = tokenizer.backend_tokenizer
    # two tokens are reserved: the one before the choice, and its leading space
    max_tokens = model.config.max_position_embeddings - 2
    return make_questions(documents, limit, seed, fits=lambda choice: len(backend.encode(choice)) <= max_tokens)


def _make_question(context: str, correct: str, wrong: list[str], rng: random.Random) -> Question:
    answer = rng.randrange(len(wrong) + 1)
    return Question(context, wrong[:answer] + [correct] + wrong[answer:], answer)
