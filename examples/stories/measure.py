"""What a model writes for requests that it has not seen, and how good it is by several measures.

    python examples/stories/measure.py --model runs/stories/sft/final --requests runs/stories/data/requests_test.jsonl

prints the share of the requests that were obeyed (checks.py) and, beside it, what a gain may have cost: length, the share
of texts that ended by themselves, and how varied they are (distinct pairs of words among all pairs, in texts cut to equal
numbers of words). Texts are drawn at temperature 1, as reinforcement learning draws them.
"""

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checks

ROWS = 100  # generated at a time


@dataclass
class Written:
    """One model's answers, one entry per request."""

    texts: list[str]
    tokens: list[int]
    """Each with its stop token."""
    ended: list[bool]
    divergence: list[float] | None = None
    """log p(text) under the model minus that under the reference, in nats: its mean estimates the KL divergence."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> "Written":
        return cls(**json.loads(path.read_text()))


def read_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def write(
    model_folder: Path | str,
    prompts: Sequence[Any],
    *,
    seed: int,
    longest: int = 96,
    reference: Path | str | None = None,
    temperature: float = 1.0,
) -> Written:
    """One text per prompt (messages, or text to continue), drawn with nothing but the temperature in the way."""
    import torch
    from transformers import set_seed

    from scratch_gpt.alignment.data.chat_template import encode_prompt, stop_tokens
    from scratch_gpt.alignment.ppo.rollout import completion_logits, generate, token_logprobs
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(str(model_folder))
    model.eval()
    other = None if reference is None else load_model(str(reference))[0].eval()
    stop_ids = stop_tokens(tokenizer, chat=True)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    written = Written([""] * len(ids), [0] * len(ids), [False] * len(ids), None if other is None else [0.0] * len(ids))
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # little padding
    set_seed(seed)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        batch = generate(
            model,
            [ids[row] for row in rows],
            max_completion_length=longest,
            temperature=temperature,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id,
        )
        for row, completion, mask, ended in zip(
            rows, batch.completion_ids, batch.completion_mask, batch.ended, strict=True
        ):
            written.texts[row] = tokenizer.decode(completion[mask.bool()], skip_special_tokens=True).strip()
            written.tokens[row], written.ended[row] = int(mask.sum()), bool(ended)
        if other is not None and written.divergence is not None:
            length = batch.completion_mask.shape[1]
            with torch.no_grad():
                each = [
                    token_logprobs(
                        completion_logits(one, batch.input_ids, batch.attention_mask, length, temperature),
                        batch.completion_ids,
                    )
                    for one in (model, other)
                ]
            sums = ((each[0] - each[1]) * batch.completion_mask).sum(1)
            for row, nats in zip(rows, sums.tolist(), strict=True):
                written.divergence[row] = nats
    return written


def loss_on_answers(model_folder: Path | str, examples: Sequence[dict[str, Any]]) -> float:
    """Nats per token of the answers, the token that ends them included, in the chat template."""
    import torch

    from scratch_gpt.alignment.sft import encode
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(str(model_folder))
    model.eval()
    nats, tokens = 0.0, 0
    for example in examples:
        row, _ = encode(tokenizer, example)
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        number = int((labels != -100).sum())
        nats, tokens = nats + loss.item() * number, tokens + number
    return nats / tokens


def reward_scores(reward_folder: Path | str, prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """What a reward model of ours gives to each text as the answer to its prompt."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from scratch_gpt.alignment.data.chat_template import encode_answer

    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1, dtype=torch.float32).eval()
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        asked, answered = encode_answer(tokenizer, prompt, [{"role": "assistant", "content": text}])
        rows.append(asked + answered)
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), ROWS):
        taken = order[start : start + ROWS]
        batch = tokenizer.pad({"input_ids": [rows[row] for row in taken]}, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        for row, score in zip(taken, found.tolist(), strict=True):
            scores[row] = score
    return scores


def share(values: Sequence[float]) -> dict[str, Any]:
    """How many of the values are 1, and the 95% interval of that by Wilson's score; a half is half a success."""
    from scratch_gpt.alignment.reward_report import Proportion

    found = Proportion.of(sum(values), len(values))
    return {"share": found.value, "interval": [found.low, found.high], "number": found.number}


def win_rate(scores: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """How often the first text of a request has the higher score; a tie is half a win."""
    return share([0.5 if a == b else float(a > b) for a, b in zip(scores, others, strict=True)])


def distinct_pairs(texts: Sequence[str], words_in_all: int = 5000) -> float:
    """Distinct pairs of neighbouring words among the first so many, of texts in a fixed random order."""
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    pairs = []
    for row in order:
        words = checks.words(texts[row])
        pairs += list(itertools.pairwise(words))
    pairs = pairs[:words_in_all]
    return len(set(pairs)) / max(1, len(pairs))


def describe(written: Written, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of this file, by kind of demand as well."""
    columns = {name: [request[name] for request in requests] for name in checks.DEMANDS}
    by_demand: dict[str, list[float]] = {name: [] for name in checks.DEMANDS}
    for text, request in zip(written.texts, requests, strict=True):
        for name, score in checks.scores(text, request).items():
            by_demand[name].append(float(score == 1))
    return {
        "obeyed": share(checks.obeyed(written.texts, **columns)),
        "demands_met": statistics.fmean(checks.demands_met(written.texts, **columns)),
        "obeyed_by_demand": {name: statistics.fmean(values) for name, values in by_demand.items() if values},
        "mean_length": statistics.fmean(written.tokens),
        "ended": statistics.fmean(written.ended),
        "distinct_pairs": distinct_pairs(written.texts),
        **({} if written.divergence is None else {"kl": statistics.fmean(written.divergence)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="the first so many requests")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="print so many texts")
    arguments = parser.parse_args()
    requests = read_lines(arguments.requests, arguments.limit)
    prompts = [request["prompt"] for request in requests]
    written = write(arguments.model, prompts, seed=arguments.seed, temperature=arguments.temperature)
    for request, text in list(zip(requests, written.texts, strict=True))[: arguments.show]:
        print(f"> {request['prompt'][0]['content']}\n  {text}\n")
    for name, value in describe(written, requests).items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
