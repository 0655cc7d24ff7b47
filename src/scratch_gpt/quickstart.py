"""From text to a benchmarked model in a few minutes: `scratch-gpt quickstart`.

Text to tokenizer to shards to a pretrained model, with samples before and after, a reload in a process without this
package, a benchmark and a model card. Finished steps are kept: after an interruption, the same command resumes.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from scratch_gpt.config import QuickstartSettings
from scratch_gpt.console import console, format_duration, print0, printable
from scratch_gpt.data.shards import read_manifest, totals
from scratch_gpt.data.sources import split_documents
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.builtin_tasks import split_sentences
from scratch_gpt.files import write_json
from scratch_gpt.training.run_directory import record_settings, run_directory, stored_settings

RESULTS = Path("evaluation") / "results.json"
RESERVED_SECONDS = 45.0
"""For what follows training: samples, the reload, the benchmark."""
NUM_PROMPTS, WORDS_PER_PROMPT = 3, 6
NUM_QUESTIONS = 100
"""Per benchmark."""
NUM_SECTIONS = 6


def quickstart_command(settings: QuickstartSettings) -> None:
    """`scratch-gpt quickstart`."""
    started = time.perf_counter()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("quickstart runs in one process; use `accelerate launch` with `pretrain` for several")
    with run_directory(settings) as run_dir:
        stored_steps = stored_settings(run_dir).get("max_steps")
        if (run_dir / RESULTS).is_file() and settings.max_steps in (None, stored_steps):
            print0(f"{run_dir} is finished; --fresh starts over.")
            print_summary(run_dir, json.loads((run_dir / RESULTS).read_text(encoding="utf-8")))
            return
        (run_dir / RESULTS).unlink(missing_ok=True)
        settings.max_steps = settings.max_steps or stored_steps
        record_settings(run_dir, settings)
        print0(f"quickstart in {run_dir}: about {settings.minutes:g} minutes. Ctrl-C saves; the same command resumes.")

        prepare_inputs(settings, run_dir)
        prompts = held_out_prompts(settings)
        pretrain_in_time(settings, run_dir, prompts, started)
        results = check_and_benchmark(settings, run_dir, prompts)
        results["seconds"] = time.perf_counter() - started
        (run_dir / RESULTS).parent.mkdir(exist_ok=True)
        write_json(run_dir / RESULTS, results)
        print0(f"\nfinished in {format_duration(results['seconds'])}")
        print_summary(run_dir, results)


@contextmanager
def section(number: int, title: str) -> Iterator[None]:
    """Print a heading, and show a spinner until the block ends."""
    print0(f"\n[{number}/{NUM_SECTIONS}] {title}")
    with console.status(title):
        yield


def prepare_inputs(settings: QuickstartSettings, run_dir: Path) -> None:
    from scratch_gpt.distributed.launch import launch_state
    from scratch_gpt.training.monitor import check_monitoring
    from scratch_gpt.training.pretrain import prepare_data, prepare_tokenizer

    check_monitoring(settings, launch_state().device)
    with section(1, "tokenizer: byte-level BPE trained on the corpus"):
        prepare_tokenizer(settings, run_dir)
    with section(2, "data: the corpus as token shards, some of it held out"):
        prepare_data(settings, run_dir)


def held_out_prompts(settings: QuickstartSettings) -> list[str]:
    """The first words of a few held-out sentences, which training never sees."""
    _, held_out, _ = split_documents(settings)
    sentences = [s for s in split_sentences(islice(held_out, 200)) if len(s.split()) > 2 * WORDS_PER_PROMPT]
    if not sentences:
        return ["The"] * NUM_PROMPTS
    indices = [len(sentences) * (2 * i + 1) // (2 * NUM_PROMPTS) for i in range(NUM_PROMPTS)]
    return [" ".join(sentences[index].split()[:WORDS_PER_PROMPT]) for index in indices]


def pretrain_in_time(settings: QuickstartSettings, run_dir: Path, prompts: list[str], started: float) -> None:
    """Train for as many steps as fit into ``settings.minutes`` since ``started``, a time of `time.perf_counter`."""
    from scratch_gpt.inference.generate import generate_samples
    from scratch_gpt.training.build import build
    from scratch_gpt.training.pretrain import train

    def seconds_left() -> float:
        return settings.minutes * 60 - (time.perf_counter() - started) - RESERVED_SECONDS

    with section(3, "pretraining"):
        run = build(settings, run_dir, budget_seconds=seconds_left())
        if settings.max_steps is None:
            settings.max_steps = run.steps_in(seconds_left())
            record_settings(run_dir, settings)
        if run.start.checkpoint is None:
            print0("\nsamples before training:")
            for text in generate_samples(run.model, run.tokenizer, prompts, settings.seed):
                print0(f"  > {printable(text)}")
            run.model.train()
            print0()
    train(run)


def check_and_benchmark(settings: QuickstartSettings, run_dir: Path, prompts: list[str]) -> dict[str, Any]:
    """Check the saved model: samples, a reload elsewhere, the benchmark; write the model card."""
    from scratch_gpt.evaluation.evaluate import describe, evaluate
    from scratch_gpt.inference.generate import generate_samples
    from scratch_gpt.model.loading import load_model
    from scratch_gpt.publishing.model_card import write_model_card
    from scratch_gpt.publishing.verify import reload_elsewhere
    from scratch_gpt.training.metrics import read_events, read_metrics
    from scratch_gpt.training.spike_guard import summarize_events

    final = run_dir / "final"
    model, tokenizer = load_model(str(final))
    _, held_out, held_out_description = split_documents(settings)
    texts = list(held_out)

    with section(4, "samples: the same prompts, continued by the trained model"):
        sample_texts = generate_samples(model, tokenizer, prompts, settings.seed)
        for text in sample_texts:
            print0(f"  > {printable(text)}")

    with section(5, f"reload: {final} in a new process that cannot import scratch_gpt"):
        difference = reload_elsewhere(final, model, tokenizer, " ".join(texts[0].split()[:60]))
        if difference != 0.0:
            raise RuntimeError(
                f"the logits differ by {difference} after the reload: the saved model differs from the trained one"
            )
        print0("AutoModelForCausalLM and AutoTokenizer loaded it there, and its logits are equal, bit for bit")

    with section(6, "benchmark: the lm-eval harness on questions made from the held-out text"):
        evaluation = evaluate(
            model,
            tokenizer,
            texts,
            task_folder=run_dir / "evaluation" / "tasks",
            limit=NUM_QUESTIONS,
            seed=settings.seed,
        )
        for score in evaluation.scores:
            print0(describe(score))
        if not evaluation.scores:
            print0("the held-out text is too short to make questions from")
        manifest = read_manifest(run_dir / "data" if settings.data_path is None else Path(settings.data_path))
        records = read_metrics(run_dir / "metrics.jsonl")
        training_seconds = sum(
            (now["tokens"] - before["tokens"]) / now["tokens_per_second"]
            for before, now in zip([{"tokens": 0}, *records], records, strict=False)
        )
        state = json.loads((run_dir / f"checkpoint-{settings.max_steps}/trainer_state/state.json").read_text())
        write_model_card(
            final,
            model,
            evaluation,
            title=f"{run_dir.name}: a GPT made from scratch",
            evaluation_text="; ".join(
                f"{entry['held_out']} of {entry['source']}" for entry in manifest["sources"].values()
            ),
            samples=sample_texts,
            training={
                "corpus": " and ".join(entry["source"] for entry in manifest["sources"].values()),
                "train_tokens": totals(manifest, "train")["tokens"],
                "train_bytes": totals(manifest, "train")["bytes"],
                "tokens_seen": records[-1]["tokens"],
                "steps": records[-1]["step"],
                "precision": state["precision"],
                "training_time": format_duration(training_seconds) + " minutes",
                "seed": settings.seed,
                "guard": summarize_events(read_events(run_dir / "metrics.jsonl")) or "no events",
            },
        )
        print0(f"model card {final}/README.md")
    return {
        **evaluation.as_dict(),
        "held_out": held_out_description,
        "num_parameters": model.num_parameters(),
        "tokens_seen": records[-1]["tokens"],
        "training_seconds": training_seconds,
        "reload_difference": difference,
        "samples": sample_texts,
    }


def print_summary(run_dir: Path, results: dict[str, Any]) -> None:
    final = run_dir / "final"
    command = "scratch-gpt" if shutil.which("scratch-gpt") else os.path.relpath(sys.argv[0])
    scores = ", ".join(
        f"{score['task']} {score['value']:.0%} (chance {score['chance']:.0%})" for score in results["scores"]
    )
    print0(
        f"  {results['num_parameters']:,} parameters, {results['tokens_seen']:,} tokens seen in "
        f"{format_duration(results['training_seconds'])} of training\n"
        f"  {results['bits_per_byte']:.3f} bits per byte on held-out text" + (f"; {scores}" if scores else "")
    )
    print0(f"\nmodel and card {final}\nmetrics        {run_dir}/metrics.jsonl\nbenchmark      {run_dir / RESULTS}")
    print0(
        "\nnext:\n"
        f'  {command} generate --model {final} --prompt "It was"\n'
        f"  {command} pretrain --run-dir runs/mine --corpus YOUR_TEXT.txt --max-steps 2000\n"
        f"  hf upload YOUR_NAME/my-gpt {final}        (after `hf auth login`: on the Hub, private or public)"
    )
