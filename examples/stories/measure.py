"""Let a model answer held-out requests, and measure the answers.

    python examples/stories/measure.py --model runs/stories/sft/final --requests runs/stories/data/requests_test.jsonl

prints the percentage of requests that were obeyed (checks.py), and what a gain may have cost: the length, how many answers
ended by themselves, and how varied they are (the fraction of distinct pairs among the first 5,000 pairs of neighboring
words). Answers are sampled at temperature 1, as in reinforcement learning.
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

BATCH_SIZE = 100


@dataclass
class Answers:
    """One model's answers; every list has one entry per request."""

    texts: list[str]
    tokens: list[int]
    """The number of tokens, including the stop token."""
    ended: list[bool]
    """Whether the answer ended with a stop token."""
    divergence: list[float] | None = None
    """Log-probability of the text under the model minus that under the reference, in nats; the mean estimates the KL divergence."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> "Answers":
        return cls(**json.loads(path.read_text()))


def read_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def generate_answers(
    model_folder: Path | str,
    prompts: Sequence[Any],
    *,
    seed: int,
    max_completion_length: int = 96,
    reference: Path | str | None = None,
    temperature: float = 1.0,
) -> Answers:
    """Sample one text per prompt (messages, or text to continue) from the full distribution at ``temperature``.

    With a ``reference`` model, also measure each text's log-probability under both.
    """
    import torch
    from transformers import set_seed

    from scratch_gpt.alignment.data.chat_template import encode_prompt, eos_token_ids
    from scratch_gpt.alignment.ppo.rollout import completion_logits, generate, token_logprobs
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(str(model_folder))
    model.eval()
    reference_model = None if reference is None else load_model(str(reference))[0].eval()
    stop_ids = eos_token_ids(tokenizer, is_chat=True)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    count = len(prompt_ids)
    answers = Answers([""] * count, [0] * count, [False] * count, None if reference is None else [0.0] * count)
    order = sorted(range(count), key=lambda index: len(prompt_ids[index]))  # to pad little
    set_seed(seed)
    for start in range(0, len(order), BATCH_SIZE):
        indices = order[start : start + BATCH_SIZE]
        batch = generate(
            model,
            [prompt_ids[index] for index in indices],
            max_completion_length=max_completion_length,
            temperature=temperature,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id,
        )
        for index, completion, mask, ended in zip(
            indices, batch.completion_ids, batch.completion_mask, batch.ended, strict=True
        ):
            answers.texts[index] = tokenizer.decode(completion[mask.bool()], skip_special_tokens=True).strip()
            answers.tokens[index], answers.ended[index] = int(mask.sum()), bool(ended)
        if reference_model is not None and answers.divergence is not None:
            length = batch.completion_mask.shape[1]
            with torch.no_grad():
                logprobs, reference_logprobs = [
                    token_logprobs(
                        completion_logits(scored, batch.input_ids, batch.attention_mask, length, temperature),
                        batch.completion_ids,
                    )
                    for scored in (model, reference_model)
                ]
            sums = ((logprobs - reference_logprobs) * batch.completion_mask).sum(1)
            for index, nats in zip(indices, sums.tolist(), strict=True):
                answers.divergence[index] = nats
    return answers


def loss_on_answers(model_folder: Path | str, examples: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss, in nats per token of the answers including the token that ends each."""
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
        count = int((labels != -100).sum())
        nats, tokens = nats + loss.item() * count, tokens + count
    return nats / tokens


def reward_scores(reward_folder: Path | str, prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """Return a reward model's score of each text as the answer to its prompt."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from scratch_gpt.alignment.data.chat_template import encode_prompt_completion

    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1, dtype=torch.float32).eval()
    sequences = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids, completion = encode_prompt_completion(tokenizer, prompt, [{"role": "assistant", "content": text}])
        sequences.append(ids + completion)
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), BATCH_SIZE):
        indices = order[start : start + BATCH_SIZE]
        batch = tokenizer.pad(
            {"input_ids": [sequences[index] for index in indices]}, padding_side="right", return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for index, score in zip(indices, logits[:, 0].tolist(), strict=True):
            scores[index] = score
    return scores


def proportion(values: Sequence[float]) -> dict[str, Any]:
    """Return the proportion of successes (1; 0.5 counts half) among ``values``, and its 95% interval by Wilson."""
    from scratch_gpt.alignment.reward_report import Proportion

    result = Proportion.of(sum(values), len(values))
    return {"share": result.value, "interval": [result.low, result.high], "number": result.total}


def win_rate(scores: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return how often the first text of a request has the higher score; a tie is half a win."""
    return proportion([0.5 if a == b else float(a > b) for a, b in zip(scores, others, strict=True)])


def distinct_pairs(texts: Sequence[str], num_pairs: int = 5000) -> float:
    """Return the fraction of distinct pairs among the first ``num_pairs`` pairs of neighboring words, in random order of texts."""
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    pairs = []
    for index in order:
        pairs += list(itertools.pairwise(checks.words(texts[index])))
    pairs = pairs[:num_pairs]
    return len(set(pairs)) / max(1, len(pairs))


def evaluate(answers: Answers, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return all measures of the answers, and for each kind of demand how often it is met."""
    columns = {name: [request[name] for request in requests] for name in checks.DEMANDS}
    by_demand: dict[str, list[float]] = {name: [] for name in checks.DEMANDS}
    for text, request in zip(answers.texts, requests, strict=True):
        for name, score in checks.scores(text, request).items():
            by_demand[name].append(float(score == 1))
    return {
        "obeyed": proportion(checks.obeyed(answers.texts, **columns)),
        "demands_met": statistics.fmean(checks.demands_met(answers.texts, **columns)),
        "obeyed_by_demand": {name: statistics.fmean(values) for name, values in by_demand.items() if values},
        "mean_length": statistics.fmean(answers.tokens),
        "ended": statistics.fmean(answers.ended),
        "distinct_pairs": distinct_pairs(answers.texts),
        **({} if answers.divergence is None else {"kl": statistics.fmean(answers.divergence)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="answer only the first LIMIT requests. Default: 1000")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="how many answers to print. Default: 3")
    arguments = parser.parse_args()
    requests = read_lines(arguments.requests, arguments.limit)
    prompts = [request["prompt"] for request in requests]
    answers = generate_answers(arguments.model, prompts, seed=arguments.seed, temperature=arguments.temperature)
    for request, text in list(zip(requests, answers.texts, strict=True))[: arguments.show]:
        print(f"> {request['prompt'][0]['content']}\n  {text}\n")
    for name, value in evaluate(answers, requests).items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
