"""Everything the stages learn from and are measured on, made from one corpus of stories.

    python examples/stories/make_data.py --corpus FOLDER --output runs/stories/data

FOLDER (or a file) holds `.txt` files with one paragraph a line and a line `<|endoftext|>` after each story; left out, it
is the bundled novels of Jane Austen. The stories go to four parts by a fixed seed, and no story is in two of them:

    train        the base model and supervised fine-tuning learn from these
    preferences  pairs for the reward model, and the requests that reinforcement learning answers
    judge        pairs for a second reward model that only judges
    test         nothing learns from these

    OUTPUT/pretrain.txt, pretrain_test.txt      whole stories of train and test
           sft_train.jsonl, sft_test.jsonl      a request and the paragraph that answers it, as `prompt` and `completion`
           requests_{preferences,judge,test}.jsonl   requests with their demands (see checks.py) and, as `answer`, the paragraph
           pairs_{preferences,judge,test}.jsonl      an answer beside a worse one, as `prompt`, `chosen`, `rejected`, `kind`
           summary.json                         how many there are of each

A request is made backwards, from a paragraph that is its answer: "Write a part of a story. Use the words lantern and
river." Each demand is met by the paragraph and checked by a program.

The worse text of a pair is as long as the better one, and no check takes part in making it. It is either another
paragraph, taken from the answer to another request (`swapped`: good prose that does not do what was asked), or the answer
itself with its words in the wrong places (`shuffled`: neighbouring pieces of a few words changed over). Samples of the
fine-tuned model are added by `run.py` when there is one.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks

PARTS = {"train": 0.78, "preferences": 0.12, "judge": 0.06, "test": 0.04}
SHORTEST, LONGEST = 90, 280  # characters of a paragraph that is an answer
VALIDATION = 1000  # examples that fine-tuning is validated on
FEWEST_STORIES = 100  # a corpus of fewer documents (novels) is cut into pieces of so many paragraphs:
PIECE = 12
COMMON_WORDS, KNOWN_WORDS = 150, 1200  # a request asks for words between these ranks by frequency
KNOWN_NAMES = 50  # and for so many names. What a small model has seen often, and its tokenizer has whole, it can repeat
TITLES = {"Mrs", "Miss", "Sir", "Lady", "Lord", "Captain", "Colonel", "Doctor", "Professor", "King", "Queen"}
NUMBERS = {1: "one sentence", 2: "two sentences", 3: "three sentences", 4: "four sentences"}


@dataclass
class Story:
    part: str
    paragraphs: list[str]


@dataclass
class Vocabulary:
    """What the corpus says about words: which may be asked for, and which are names."""

    askable: set[str]
    names: set[str]


def read_stories(corpus: Path) -> list[list[str]]:
    """The paragraphs of each story."""
    files = sorted(corpus.glob("*.txt")) if corpus.is_dir() else [corpus]
    stories: list[list[str]] = []
    for file in files:
        for document in file.read_text(encoding="utf-8").split("<|endoftext|>"):
            paragraphs = [line.strip() for line in document.splitlines() if line.strip()]
            if paragraphs:
                stories.append(paragraphs)
    if not stories:
        raise SystemExit(f"{corpus} holds no text (.txt, one paragraph a line, <|endoftext|> after each story)")
    if len(stories) < FEWEST_STORIES:
        stories = [story[at : at + PIECE] for story in stories for at in range(0, len(story), PIECE)]
    return stories


def bundled_corpus() -> Path:
    import scratch_gpt

    return Path(scratch_gpt.__file__).parent / "data" / "corpus"


def split(stories: list[list[str]], rng: random.Random) -> list[Story]:
    order = list(range(len(stories)))
    rng.shuffle(order)
    parts = [""] * len(stories)
    first, total = 0, 0.0
    for name, share in PARTS.items():
        total += share
        until = round(total * len(order))
        for index in order[first:until]:
            parts[index] = name
        first = until
    return [Story(part, story) for part, story in zip(parts, stories, strict=True)]


def learn_words(stories: list[Story]) -> Vocabulary:
    """From the training stories: middling words, and words that are nearly always written large within a sentence."""
    lower: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for story in stories:
        if story.part != "train":
            continue
        for paragraph in story.paragraphs:
            lower.update(re.findall(r"\b[a-z]+\b", paragraph))
            inside.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", paragraph))
    ranked = [word for word, _ in lower.most_common(KNOWN_WORDS)]
    askable = {word for word in ranked[COMMON_WORDS:] if len(word) >= 4}
    names = [name for name, count in inside.most_common() if lower[name.lower()] < count / 20 and name not in TITLES]
    return Vocabulary(askable, set(names[:KNOWN_NAMES]))


def is_answer(paragraph: str) -> bool:
    """Prose of one to four whole sentences, without headings and lists."""
    return (
        SHORTEST <= len(paragraph) <= LONGEST
        and re.match(r"[A-Z\"“]", paragraph) is not None
        and re.search(r"[.!?][\"”]?$", paragraph) is not None
        and re.search(r"[*#\[\]|_:;()<>0-9]", paragraph) is None
        and paragraph.count('"') % 2 == 0
        and checks.count_sentences(paragraph) in NUMBERS
    )


def make_request(paragraph: str, vocabulary: Vocabulary, rng: random.Random) -> dict[str, Any] | None:
    """One or two kinds of demand that the paragraph meets, and the sentences that ask for them; None if it has no words."""
    request: dict[str, Any] = {"words": [], "hero": "", "begins_with": "", "ends_with": "", "sentences": 0}
    askable = sorted(vocabulary.askable.intersection(checks.words(paragraph)))
    names = sorted(vocabulary.names.intersection(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", paragraph)))
    last = checks.words(paragraph)[-1]
    possible = {
        "words": 5 if len(askable) >= 3 else 0,
        "hero": 3 if names else 0,
        "begins_with": 1,
        "ends_with": 1 if last in vocabulary.askable else 0,
        "sentences": 1,
    }
    if not askable and not names:
        return None
    demands = set(rng.choices(list(possible), list(possible.values()), k=2))
    said = ["Write a part of a story."]
    if "words" in demands:
        # The last word would be asked for twice where the end is given as well.
        free = [word for word in askable if word != last or "ends_with" not in demands]
        chosen = rng.sample(free, 2 if len(demands) == 1 else 1)
        request["words"] = chosen
        said.append(f"Use the word{'s' * (len(chosen) - 1)} {' and '.join(chosen)}.")
    if "hero" in demands:
        request["hero"] = rng.choice(names)
        said.append(f"It is about {request['hero']}.")
    if "sentences" in demands:
        request["sentences"] = checks.count_sentences(paragraph)
        said.append(f"Write {NUMBERS[request['sentences']]}.")
    if "begins_with" in demands:
        request["begins_with"] = " ".join(paragraph.split()[: rng.randint(2, 4)]).strip(',."“”!?')
        said.append(f"Begin with: {request['begins_with']}")
    if "ends_with" in demands:
        request["ends_with"] = last
        said.append(f"End with the word {last}.")
    return {"prompt": [{"role": "user", "content": " ".join(said)}], **request, "answer": paragraph}


def requests_of(
    stories: list[Story], part: str, vocabulary: Vocabulary, rng: random.Random, seen: set[str]
) -> list[Any]:
    """A request for every paragraph of the part that can be an answer and was not one before."""
    requests = []
    for story in stories:
        if story.part != part:
            continue
        for paragraph in story.paragraphs:
            if paragraph in seen or not is_answer(paragraph):
                continue
            seen.add(paragraph)
            request = make_request(paragraph, vocabulary, rng)
            if request is not None:
                requests.append(request)
    rng.shuffle(requests)
    return requests


def shuffled(paragraph: str, rng: random.Random) -> str:
    """The same words: pieces of two to four words, half of them changed over with the next piece."""
    words = paragraph.split()
    pieces = []
    while words:
        length = rng.randint(2, 4)
        pieces.append(words[:length])
        words = words[length:]
    at = 0
    while at + 1 < len(pieces):
        if rng.random() < 0.5:
            pieces[at], pieces[at + 1] = pieces[at + 1], pieces[at]
            at += 1
        at += 1
    return " ".join(word for piece in pieces for word in piece)


def pairs_of(requests: list[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """For each request a pair of one kind, the two kinds in turn."""
    by_length: dict[int, list[str]] = {}
    for request in requests:
        by_length.setdefault(len(request["answer"]) // 5, []).append(request["answer"])
    for number, request in enumerate(requests):
        answer = request["answer"]
        if number % 2:
            kind, worse = "shuffled", shuffled(answer, rng)
        else:
            others = [text for text in by_length[len(answer) // 5] if text != answer]
            kind, worse = "swapped", rng.choice(others) if others else ""
        if worse and worse != answer:
            yield pair(request, worse, kind)


def pair(request: dict[str, Any], worse: str, kind: str) -> dict[str, Any]:
    return {
        "prompt": request["prompt"],
        "chosen": [{"role": "assistant", "content": request["answer"]}],
        "rejected": [{"role": "assistant", "content": worse}],
        "kind": kind,
    }


def example(request: dict[str, Any]) -> dict[str, Any]:
    """For supervised fine-tuning."""
    return {"prompt": request["prompt"], "completion": [{"role": "assistant", "content": request["answer"]}]}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> int:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def make_data(corpus: Path, output: Path, seed: int = 0) -> dict[str, int]:
    """Write all files and return how many lines (stories, for text) each has."""
    rng = random.Random(seed)
    stories = split(read_stories(corpus), rng)
    vocabulary = learn_words(stories)
    output.mkdir(parents=True, exist_ok=True)
    summary = {}
    for part, name in (("train", "pretrain.txt"), ("test", "pretrain_test.txt")):
        texts = ["\n".join(story.paragraphs) for story in stories if story.part == part]
        (output / name).write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
        summary[name] = len(texts)
    seen: set[str] = set()
    for part in PARTS:
        requests = requests_of(stories, part, vocabulary, rng, seen)
        if part in ("train", "test"):
            name = f"sft_{part}.jsonl"
            taken = requests if part == "train" else requests[:VALIDATION]
            summary[name] = write_lines(output / name, [example(request) for request in taken])
        if part != "train":
            name = f"requests_{part}.jsonl"
            summary[name] = write_lines(output / name, requests)
            name = f"pairs_{part}.jsonl"
            summary[name] = write_lines(output / name, list(pairs_of(requests, rng)))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="file or folder of .txt; left out: the bundled novels")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    corpus = arguments.corpus or bundled_corpus()
    for name, count in make_data(corpus, arguments.output, arguments.seed).items():
        print(f"{count:8,}  {arguments.output / name}")


if __name__ == "__main__":
    main()
