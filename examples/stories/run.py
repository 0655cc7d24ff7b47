"""Train a base model, align it by SFT, DPO, PPO and GRPO, and measure what each step gains.

    python examples/stories/run.py --size smoke                                  # minutes, on the bundled novels
    python examples/stories/run.py --size real --corpus FOLDER                   # hours: see README.md

Every step runs a `scratch-gpt` command with the settings of a YAML file in this folder, and measures the result. Run the same
command again to resume: finished steps are skipped. `--only sft` runs the steps up to sft. RUN_DIR/results.json has all
numbers, with the seconds that each step took; RUN_DIR/results.md has them as tables.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks
import make_data
import measure
import tables

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
ANSWERS_PER_REQUEST = 4  # of the fine-tuned model; the best and the worst make a pair for DPO
MAX_LENGTH_DIFFERENCE = 0.25  # between a sampled rejected answer and the chosen one, relative to the latter


@dataclass
class Size:
    """Sizes of a run, and how its settings differ from the YAML files."""

    num_requests: int
    """Held-out requests that every model answers."""
    max_answer_length: int
    """Tokens after which an answer is truncated."""
    num_sampled: dict[str, int]
    """Requests of each part that the fine-tuned model answers, as rejected sides of pairs."""
    num_dpo_requests: int
    """Requests with ANSWERS_PER_REQUEST answers each; PPO and GRPO generate as many texts in total."""
    seeds: tuple[int, ...]
    overrides: dict[str, list[str]]
    """More arguments of each command, by YAML file."""


REAL = Size(
    600,
    96,
    {"preferences": 4000, "judge": 2000, "test": 1000},
    1200,
    SEEDS,
    {"base": [], "sft": [], "reward": [], "dpo": [], "ppo": [], "grpo": []},
)
TINY = """
    --tokenizer.vocab_size=512 --model.hidden_size=64 --model.num_hidden_layers=2 --model.num_attention_heads=2
    --model.num_key_value_heads=2 --model.intermediate_size=128 --training.warmup_steps=2
"""
SMOKE = Size(
    20,
    64,
    {"preferences": 100, "judge": 100, "test": 100},
    64,
    (1,),
    {
        "base": [*TINY.split(), "--max-steps=30", "--training.precision=fp32", "--training.compile=off"],
        "sft": ["--max-steps=20", "--sft.batch_size=8", "--sft.precision=fp32"],
        "reward": ["--max-steps=20", "--reward.batch_size=8", "--reward.precision=fp32"],
        "dpo": ["--max-steps=4", "--dpo.batch_size=4", "--dpo.precision=fp32"],
        "ppo": [
            "--max-steps=8",
            "--ppo.mini_batch_size=16",
            "--ppo.precision=fp32",
            "--validation-fraction=0.1",
            "--ppo.max_completion_length=24",
        ],
        "grpo": [
            "--max-steps=16",
            "--grpo.batch_size=16",
            "--grpo.precision=fp32",
            "--validation-fraction=0.1",
            "--grpo.max_completion_length=24",
        ],
    },
)


def run_subprocess(arguments: list[str]) -> int:
    """Run `scratch-gpt` with these arguments from the project's root; return its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "scratch_gpt", *arguments], cwd=HERE.parents[1], check=False
    ).returncode


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished children, which depends little on what else the machine does."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Lineage:
    """The steps, in order. Each is a method that writes to RUN_DIR and returns its measurements."""

    def __init__(
        self, size: Size, corpus: Path | None, run_dir: Path, scratch_gpt: Callable[[list[str]], int] = run_subprocess
    ):
        self.size, self.corpus, self.dir, self.scratch_gpt = size, corpus, run_dir, scratch_gpt
        self.results_path = run_dir / "results.json"
        self.results: dict[str, Any] = json.loads(self.results_path.read_text()) if self.results_path.is_file() else {}

    # ------------------------------------------------------------------------------------------------ machinery

    def steps(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "data", self.data
        yield "base", self.base
        yield "sft", self.sft
        yield "pairs", self.pairs
        yield "reward", lambda: self.reward_model("reward", "preferences", 1)
        yield "judge", lambda: self.reward_model("judge", "judge", 2)
        yield "answers", self.answers
        yield "dpo", lambda: self.dpo("dpo", self.by_reward_model)
        for seed in self.size.seeds:
            yield f"ppo-{seed}", lambda seed=seed: self.ppo(f"ppo-{seed}", seed)
        for seed in self.size.seeds:
            yield f"checks-dpo-{seed}", lambda seed=seed: self.dpo(f"checks-dpo-{seed}", self.by_checks, seed)
            yield f"checks-ppo-{seed}", lambda seed=seed: self.ppo(f"checks-ppo-{seed}", seed, *self.checks_as_reward())
            yield f"checks-grpo-{seed}", lambda seed=seed: self.grpo(f"checks-grpo-{seed}", seed)

    def run(self, until: str | None) -> None:
        names = [name for name, _ in self.steps()]
        if until is not None and until not in names:
            raise SystemExit(f"--only {until}: the steps are {', '.join(names)}")
        self.dir.mkdir(parents=True, exist_ok=True)
        for name, step in self.steps():
            if name not in self.results:
                print(f"\n== {name}", flush=True)
                started, started_cpu = time.monotonic(), cpu_seconds()
                measured = step()
                self.results[name] = {
                    "seconds": round(time.monotonic() - started, 1),
                    "processor_seconds": round(cpu_seconds() - started_cpu, 1),
                    **measured,
                }
                self.results_path.write_text(json.dumps(self.results, indent=2) + "\n")
                (self.dir / "results.md").write_text(tables.to_markdown(self.results))
                print(f"== {name}: {json.dumps(self.results[name])}", flush=True)
            if name == until:
                break

    def command(self, name: str, config: str, run_dir: str, *overrides: str | Path) -> dict[str, Any]:
        """Run a command of scratch-gpt; return how long it took, and whether it resumed a run that had taken longer before."""
        words = [name, "--config", HERE / f"{config}.yaml", "--run-dir", self.dir / run_dir, *overrides]
        arguments = [*map(str, words), *self.size.overrides[config]]
        print("$ scratch-gpt " + " ".join(arguments), flush=True)
        resumed = any((self.dir / run_dir).glob("checkpoint-*"))
        started, started_cpu = time.monotonic(), cpu_seconds()
        if code := self.scratch_gpt(arguments):
            raise SystemExit(code)
        elapsed = {"seconds": time.monotonic() - started, "processor_seconds": cpu_seconds() - started_cpu}
        return {f"training_{name}": round(seconds, 1) for name, seconds in elapsed.items()} | {"resumed": resumed}

    def model(self, name: str) -> Path:
        return self.dir / name / "final"

    def lines(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        return measure.read_lines(self.dir / name, limit)

    def answer(self, model: Path, prompts: list[Any], seed: int, reference: Path | None = None) -> measure.Answers:
        length = self.size.max_answer_length
        return measure.generate_answers(model, prompts, seed=seed, reference=reference, max_completion_length=length)

    def test_requests(self) -> list[dict[str, Any]]:
        return self.lines("data/requests_test.jsonl", self.size.num_requests)

    # ------------------------------------------------------------------------------------------------ steps

    def data(self) -> dict[str, Any]:
        corpus = self.corpus or make_data.bundled_corpus()
        return dict(make_data.make_data(corpus, self.dir / "data"))

    def base(self) -> dict[str, Any]:
        text = ["--corpus", self.dir / "data/pretrain.txt", "--validation-corpus", self.dir / "data/pretrain_test.txt"]
        seconds = self.command("pretrain", "base", "base", *text)
        requests = self.test_requests()
        asked = self.answer(self.model("base"), [request["prompt"] for request in requests], seed=0)
        shown = self.answer(self.model("base"), [self.with_examples(request) for request in requests], seed=0)
        shown.texts = [text.split("\n")[0].strip() for text in shown.texts]
        shown.save(self.dir / "answers_base.json")
        metrics = measure.read_lines(self.dir / "base" / "metrics.jsonl")
        return {
            **seconds,
            "validation_bits_per_byte": [m for m in metrics if "validation_bits_per_byte" in m][-1][
                "validation_bits_per_byte"
            ],
            "asked_like_sft": measure.evaluate(asked, requests),
            "with_two_examples": measure.evaluate(shown, requests),
        }

    def with_examples(self, request: dict[str, Any]) -> str:
        """Make a text that a base model may continue with an answer: two requests with their answers, then this request."""
        examples = self.lines("data/sft_test.jsonl")[-20:]
        shown = [(one["prompt"][0]["content"], one["completion"][0]["content"]) for one in examples]
        shown = sorted(shown, key=lambda pair: len(pair[1]))[:2]  # the shortest, to leave room for an answer
        return "".join(f"{asked}\n{answer}\n\n" for asked, answer in shown) + request["prompt"][0]["content"] + "\n"

    def sft(self) -> dict[str, Any]:
        data = self.dir / "data"
        files = ["--data", data / "sft_train.jsonl", "--validation-data", data / "sft_test.jsonl"]
        seconds = self.command("sft", "sft", "sft", "--model", self.model("base"), *files)
        examples = self.lines("data/sft_test.jsonl", self.size.num_requests)
        losses = {
            "validation_loss_before": measure.loss_on_answers(self.model("base"), examples),
            "validation_loss": measure.loss_on_answers(self.model("sft"), examples),
        }
        requests = self.test_requests()
        answers = self.answer(self.model("sft"), [request["prompt"] for request in requests], seed=0)
        answers.save(self.dir / "answers_sft.json")
        return {**seconds, **losses, "asked": measure.evaluate(answers, requests)}

    def pairs(self) -> dict[str, Any]:
        """Add to the pairs of make_data: the fine-tuned model's answers of similar length, as rejected sides."""
        counts: dict[str, Any] = {}
        for part, seed in (("preferences", 11), ("judge", 12), ("test", 13)):
            requests = self.lines(f"data/requests_{part}.jsonl", self.size.num_sampled[part])
            texts = self.answer(self.model("sft"), [request["prompt"] for request in requests], seed=seed).texts
            sampled = [
                make_data.pair(request, text, "sampled")
                for request, text in zip(requests, texts, strict=True)
                if abs(len(text) - len(request["answer"])) <= MAX_LENGTH_DIFFERENCE * len(request["answer"])
            ]
            pairs = self.lines(f"data/pairs_{part}.jsonl") + sampled
            counts[f"pairs_{part}"] = make_data.write_lines(self.dir / f"pairs_{part}.jsonl", pairs)
            counts[f"sampled_{part}"] = len(sampled)
        return counts

    def reward_model(self, name: str, part: str, seed: int) -> dict[str, Any]:
        """Train a reward model, and measure its accuracy on held-out pairs of each kind."""
        files = ["--data", self.dir / f"pairs_{part}.jsonl", "--validation-data", self.dir / "pairs_test.jsonl"]
        seconds = self.command("reward", "reward", name, "--model", self.model("sft"), *files, "--seed", str(seed))
        report = json.loads((self.dir / name / "report.json").read_text())
        pairs = self.lines("pairs_test.jsonl")
        chosen, rejected = [
            measure.reward_scores(
                self.model(name), [p["prompt"] for p in pairs], [p[side][0]["content"] for p in pairs]
            )
            for side in ("chosen", "rejected")
        ]
        kinds: dict[str, Any] = {}
        for kind in sorted({pair["kind"] for pair in pairs}):
            indices = [index for index, pair in enumerate(pairs) if pair["kind"] == kind]
            kinds[kind] = measure.win_rate([chosen[i] for i in indices], [rejected[i] for i in indices])
        return {**seconds, "report": report, "kinds": kinds}

    def answers(self) -> dict[str, Any]:
        """Generate the answers from which pairs for DPO are made, as many texts as PPO and GRPO generate, and score them."""
        requests = [
            request
            for request in self.lines("data/requests_preferences.jsonl", self.size.num_dpo_requests)
            for _ in range(ANSWERS_PER_REQUEST)
        ]
        started = time.monotonic()
        answers = self.answer(self.model("sft"), [request["prompt"] for request in requests], seed=21)
        seconds = round(time.monotonic() - started, 1)
        columns = {name: [request[name] for request in requests] for name in checks.DEMANDS}
        scores = measure.reward_scores(self.model("reward"), [request["prompt"] for request in requests], answers.texts)
        rows = [
            {"prompt": request["prompt"], "text": text, "reward": reward, "demands_met": met}
            for request, text, reward, met in zip(
                requests, answers.texts, scores, checks.demands_met(answers.texts, **columns), strict=True
            )
        ]
        make_data.write_lines(self.dir / "answers.jsonl", rows)
        return {"drawing_seconds": seconds, "texts": len(rows), "tokens": sum(answers.tokens)}

    def by_reward_model(self, row: dict[str, Any]) -> float:
        return row["reward"]

    def by_checks(self, row: dict[str, Any]) -> float:
        return row["demands_met"]

    def dpo(self, name: str, score: Callable[[dict[str, Any]], float], seed: int = 1) -> dict[str, Any]:
        """Run DPO on the best and the worst answer to each request, where their scores differ."""
        rows = self.lines("answers.jsonl")
        pairs = []
        for start in range(0, len(rows), ANSWERS_PER_REQUEST):
            ordered = sorted(rows[start : start + ANSWERS_PER_REQUEST], key=score)
            if score(ordered[0]) < score(ordered[-1]) and ordered[0]["text"].strip() and ordered[-1]["text"].strip():
                request = {"prompt": rows[start]["prompt"], "answer": ordered[-1]["text"]}
                pairs.append(make_data.pair(request, ordered[0]["text"], score.__name__))
        held_out = max(1, len(pairs) // 10)  # the last requests
        files = {"data": pairs[:-held_out], "validation-data": pairs[-held_out:]}
        overrides: list[str | Path] = ["--seed", str(seed)]
        for option, part in files.items():
            path = self.dir / f"pairs_{name}_{option}.jsonl"
            make_data.write_lines(path, part)
            overrides += [f"--{option}", path]
        seconds = self.command("dpo", "dpo", name, "--model", self.model("sft"), *overrides)
        logged = measure.read_lines(self.dir / name / "metrics.jsonl")
        last = [record for record in logged if "eval_loss" in record][-1]
        rewards = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_rewards")}
        seconds["drawing_seconds"] = self.results["answers"]["drawing_seconds"]
        return {**seconds, "pairs": len(pairs), "held_out": rewards, **self.compare(name)}

    def checks_as_reward(self) -> list[str]:
        """Return the arguments that make ppo.yaml learn from the checks."""
        reward = ["--reward-model", "null", "--reward", "examples.stories.checks:demands_met"]
        return [*reward, "--ppo.kl_coef", "0.01", "--max-steps", "150"]

    def ppo(self, name: str, seed: int, *reward: str) -> dict[str, Any]:
        reward = reward or ("--reward-model", str(self.model("reward")))
        return self.reinforce("ppo", name, seed, *reward)

    def grpo(self, name: str, seed: int) -> dict[str, Any]:
        return self.reinforce("grpo", name, seed)

    def reinforce(self, command: str, name: str, seed: int, *reward: str) -> dict[str, Any]:
        data = ["--data", self.dir / "data/requests_preferences.jsonl", "--seed", str(seed)]
        seconds = self.command(command, command, name, "--model", self.model("sft"), *data, *reward)
        return {**seconds, **self.compare(name)}

    def compare(self, name: str) -> dict[str, Any]:
        """Compare a model's answers to the held-out requests with those of the fine-tuned model."""
        requests = self.test_requests()
        prompts = [request["prompt"] for request in requests]
        before = measure.Answers.load(self.dir / "answers_sft.json")
        after = self.answer(self.model(name), prompts, seed=0, reference=self.model("sft"))
        after.save(self.dir / f"answers_{name}.json")
        wins = {}
        for judge in ("reward", "judge"):
            scores = [measure.reward_scores(self.model(judge), prompts, answers.texts) for answers in (after, before)]
            gain = sum(scores[0]) / len(prompts) - sum(scores[1]) / len(prompts)
            wins[judge] = {"wins": measure.win_rate(*scores), "mean_gain": gain}
        return {"asked": measure.evaluate(after, requests), "against_sft": wins}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["smoke", "real"], required=True)
    parser.add_argument("--corpus", type=Path, help="folder or file of stories. Default: the bundled novels")
    parser.add_argument("--run-dir", type=Path, help="Default: runs/stories; for --size smoke, runs/stories-smoke")
    parser.add_argument("--only", help="the last step to run. Default: all steps")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or Path("runs/stories" if arguments.size == "real" else "runs/stories-smoke")
    size = REAL if arguments.size == "real" else SMOKE
    Lineage(size, arguments.corpus, run_dir.absolute()).run(arguments.only)


if __name__ == "__main__":
    main()
