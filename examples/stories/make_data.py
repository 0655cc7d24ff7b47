"""Make the training and test data of all steps from one corpus of stories.

    python examples/stories/make_data.py --corpus FOLDER --output runs/stories/data

FOLDER (or a file) holds `.txt` files with one paragraph a line and a line `<|endoftext|>` after each story. Default: the
bundled novels of Jane Austen. The stories are split at random, by a fixed seed, into four parts:

    train        for the base model and supervised fine-tuning
    preferences  pairs for the reward model, and requests for reinforcement learning
    judge        pairs for a second reward model, which only evaluates
    test         not trained on

    OUTPUT/pretrain.txt, pretrain_test.txt      the stories of train and test
           sft_train.jsonl, sft_test.jsonl      a request and the paragraph that answers it, as `prompt` and `completion`
           requests_{preferences,judge,test}.jsonl   requests with their demands (see checks.py) and, as `answer`, the paragraph
           pairs_{preferences,judge,test}.jsonl      an answer and a worse one, as `prompt`, `chosen`, `rejected`, `kind`
           summary.json                         the number of lines, or stories, in each

Each request is derived from a paragraph, which is its answer: "Write a part of a story. Use the words lantern and river."
The paragraph meets each demand, and a program can check it.

The rejected text of a pair is about as long as the chosen one, and is made without the checks. It is either the answer to
another request (`swapped`: good prose that does not do what was asked), or the answer itself in the wrong order
(`shuffled`: neighboring chunks of a few words are exchanged). `run.py` adds samples of the fine-tuned model.
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
MIN_CHARACTERS, MAX_CHARACTERS = 90, 280  # length of a paragraph that is an answer
NUM_VALIDATION_EXAMPLES = 1000  # for fine-tuning
MIN_STORIES = 100  # a corpus of fewer documents (such as novels) is cut into stories of PARAGRAPHS_PER_STORY
PARAGRAPHS_PER_STORY = 12
# Requests ask for words between these ranks by frequency, and for the most frequent names: a small model can repeat what it
# has seen often and what is a single token.
MIN_WORD_RANK, MAX_WORD_RANK = 150, 1200
NUM_NAMES = 50
TITLES = {"Mrs", "Miss", "Sir", "Lady", "Lord", "Captain", "Colonel", "Doctor", "Professor", "King", "Queen"}
NUMBERS = {1: "one sentence", 2: "two sentences", 3: "three sentences", 4: "four sentences"}


@dataclass
class Story:
    part: str
    paragraphs: list[str]


@dataclass
class Vocabulary:
    """Words and names that requests may ask for."""

    askable: set[str]
    names: set[str]


def read_stories(corpus: Path) -> list[list[str]]:
    """Return the paragraphs of each story."""
    files = sorted(corpus.glob("*.txt")) if corpus.is_dir() else [corpus]
    stories: list[list[str]] = []
    for file in files:
        for document in file.read_text(encoding="utf-8").split("<|endoftext|>"):
            paragraphs = [line.strip() for line in document.splitlines() if line.strip()]
            if paragraphs:
                stories.append(paragraphs)
    if not stories:
        raise SystemExit(f"{corpus} holds no text (.txt, one paragraph a line, <|endoftext|> after each story)")
    if len(stories) < MIN_STORIES:
        stories = [
            story[start : start + PARAGRAPHS_PER_STORY]
            for story in stories
            for start in range(0, len(story), PARAGRAPHS_PER_STORY)
        ]
    return stories


def bundled_corpus() -> Path:
    import scratch_gpt

    return Path(scratch_gpt.__file__).parent / "data" / "corpus"


def split(stories: list[list[str]], rng: random.Random) -> list[Story]:
    """Assign each story to a part, at random, in the proportions of PARTS."""
    order = list(range(len(stories)))
    rng.shuffle(order)
    parts = [""] * len(stories)
    first, total = 0, 0.0
    for name, proportion in PARTS.items():
        total += proportion
        end = round(total * len(order))
        for index in order[first:end]:
            parts[index] = name
        first = end
    return [Story(part, story) for part, story in zip(parts, stories, strict=True)]


def build_vocabulary(stories: list[Story]) -> Vocabulary:
    """Collect moderately frequent words of the training stories, and words that are nearly always capitalized in mid-sentence."""
    lower: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for story in stories:
        if story.part != "train":
            continue
        for paragraph in story.paragraphs:
            lower.update(re.findall(r"\b[a-z]+\b", paragraph))
            inside.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", paragraph))
    ranked = [word for word, _ in lower.most_common(MAX_WORD_RANK)]
    askable = {word for word in ranked[MIN_WORD_RANK:] if len(word) >= 4}
    names = [name for name, count in inside.most_common() if lower[name.lower()] < count / 20 and name not in TITLES]
    return Vocabulary(askable, set(names[:NUM_NAMES]))


def is_answer(paragraph: str) -> bool:
    """Return whether a paragraph is prose of one to four complete sentences, without headings and lists."""
    return (
        MIN_CHARACTERS <= len(paragraph) <= MAX_CHARACTERS
        and re.match(r"[A-Z\"“]", paragraph) is not None
        and re.search(r"[.!?][\"”]?$", paragraph) is not None
        and re.search(r"[*#\[\]|_:;()<>0-9]", paragraph) is None
        and paragraph.count('"') % 2 == 0
        and checks.count_sentences(paragraph) in NUMBERS
    )


def make_request(paragraph: str, vocabulary: Vocabulary, rng: random.Random) -> dict[str, Any] | None:
    """Make a request with one or two kinds of demand that the paragraph meets; None if it has no word or name to ask for."""
    request: dict[str, Any] = {"words": [], "hero": "", "begins_with": "", "ends_with": "", "sentences": 0}
    askable = sorted(vocabulary.askable.intersection(checks.words(paragraph)))
    names = sorted(vocabulary.names.intersection(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", paragraph)))
    last = checks.words(paragraph)[-1]
    weights = {
        "words": 5 if len(askable) >= 3 else 0,
        "hero": 3 if names else 0,
        "begins_with": 1,
        "ends_with": 1 if last in vocabulary.askable else 0,
        "sentences": 1,
    }
    if not askable and not names:
        return None
    demands = set(rng.choices(list(weights), list(weights.values()), k=2))
    sentences = ["Write a part of a story."]
    if "words" in demands:
        # not the last word if that is asked for anyway
        candidates = [word for word in askable if word != last or "ends_with" not in demands]
        chosen = rng.sample(candidates, 2 if len(demands) == 1 else 1)
        request["words"] = chosen
        sentences.append(f"Use the word{'s' * (len(chosen) - 1)} {' and '.join(chosen)}.")
    if "hero" in demands:
        request["hero"] = rng.choice(names)
        sentences.append(f"It is about {request['hero']}.")
    if "sentences" in demands:
        request["sentences"] = checks.count_sentences(paragraph)
        sentences.append(f"Write {NUMBERS[request['sentences']]}.")
    if "begins_with" in demands:
        request["begins_with"] = " ".join(paragraph.split()[: rng.randint(2, 4)]).strip(',."“”!?')
        sentences.append(f"Begin with: {request['begins_with']}")
    if "ends_with" in demands:
        request["ends_with"] = last
        sentences.append(f"End with the word {last}.")
    return {"prompt": [{"role": "user", "content": " ".join(sentences)}], **request, "answer": paragraph}


def requests_of(
    stories: list[Story], part: str, vocabulary: Vocabulary, rng: random.Random, seen: set[str]
) -> list[Any]:
    """Make a request from each paragraph of the part that can be an answer and is not in ``seen``, which is updated."""
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
    """Cut the paragraph into chunks of two to four words, and exchange about half of them with the next chunk."""
    words = paragraph.split()
    chunks = []
    while words:
        length = rng.randint(2, 4)
        chunks.append(words[:length])
        words = words[length:]
    index = 0
    while index + 1 < len(chunks):
        if rng.random() < 0.5:
            chunks[index], chunks[index + 1] = chunks[index + 1], chunks[index]
            index += 1
        index += 1
    return " ".join(word for chunk in chunks for word in chunk)


def pairs_of(requests: list[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield a pair for each request, of the two kinds in turn."""
    by_length: dict[int, list[str]] = {}
    for request in requests:
        by_length.setdefault(len(request["answer"]) // 5, []).append(request["answer"])
    for number, request in enumerate(requests):
        answer = request["answer"]
        if number % 2:
            kind, rejected = "shuffled", shuffled(answer, rng)
        else:
            others = [text for text in by_length[len(answer) // 5] if text != answer]
            kind, rejected = "swapped", rng.choice(others) if others else ""
        if rejected and rejected != answer:
            yield pair(request, rejected, kind)


def pair(request: dict[str, Any], rejected: str, kind: str) -> dict[str, Any]:
    """Return the row of a preference pair, whose chosen side is the request's answer."""
    return {
        "prompt": request["prompt"],
        "chosen": [{"role": "assistant", "content": request["answer"]}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "kind": kind,
    }


def example(request: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an example for supervised fine-tuning."""
    return {"prompt": request["prompt"], "completion": [{"role": "assistant", "content": request["answer"]}]}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> int:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def make_data(corpus: Path, output: Path, seed: int = 0) -> dict[str, int]:
    """Write all files; return the number of lines (for text: stories) in each."""
    rng = random.Random(seed)
    stories = split(read_stories(corpus), rng)
    vocabulary = build_vocabulary(stories)
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
            taken = requests if part == "train" else requests[:NUM_VALIDATION_EXAMPLES]
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
    parser.add_argument("--corpus", type=Path, help="file or folder of .txt files. Default: the bundled novels")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    corpus = arguments.corpus or bundled_corpus()
    for name, count in make_data(corpus, arguments.output, arguments.seed).items():
        print(f"{count:8,}  {arguments.output / name}")


if __name__ == "__main__":
    main()
