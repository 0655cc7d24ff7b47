"""The whole way in a few minutes: `scratch-gpt quickstart`.

Text to tokenizer to shards to a pretrained model, samples before and after, a reload in a process that has never heard
of this package, a benchmark and a model card. Every step that is finished is kept: the same command goes on.
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
from scratch_gpt.evaluation.builtin_tasks import sentences_of
from scratch_gpt.files import write_json
from scratch_gpt.training.run_directory import record_settings, run_directory, stored_settings

RESULTS = Path("evaluation") / "results.json"
RESERVED_SECONDS = 45.0
"""For what comes after training: samples, the reload, the benchmark."""
PROMPTS, PROMPT_WORDS = 3, 6
QUESTIONS = 100
STAGES = 6


def quickstart(settings: QuickstartSettings) -> None:
    """`scratch-gpt quickstart`."""
    started = time.perf_counter()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("quickstart runs in one process; launch `pretrain` for more")
    with run_directory(settings) as run_dir:
        stored_steps = stored_settings(run_dir).get("max_steps")
        if (run_dir / RESULTS).is_file() and settings.max_steps in (None, stored_steps):
            print0(f"{run_dir} is finished; --fresh starts over.")
            closing_lines(run_dir, json.loads((run_dir / RESULTS).read_text(encoding="utf-8")))
            return
        (run_dir / RESULTS).unlink(missing_ok=True)
        settings.max_steps = settings.max_steps or stored_steps
        record_settings(run_dir, settings)
        print0(f"quickstart in {run_dir}: about {settings.minutes:g} minutes. Ctrl-C saves; the same command goes on.")

        make_inputs(settings, run_dir)
        prompts = held_out_prompts(settings)
        pretrain(settings, run_dir, prompts, started)
        results = examine(settings, run_dir, prompts)
        results["seconds"] = time.perf_counter() - started
        (run_dir / RESULTS).parent.mkdir(exist_ok=True)
        write_json(run_dir / RESULTS, results)
        print0(f"\nfinished in {format_duration(results['seconds'])}")
        closing_lines(run_dir, results)


@contextmanager
def stage(number: int, title: str) -> Iterator[None]:
    """A heading that stays, and a moving sign that the work goes on."""
    print0(f"\n[{number}/{STAGES}] {title}")
    with console.status(title):
        yield


def make_inputs(settings: QuickstartSettings, run_dir: Path) -> None:
    from scratch_gpt.distributed.launch import launch_state
    from scratch_gpt.training.monitor import check_monitoring
    from scratch_gpt.training.pretrain import prepare_data, prepare_tokenizer

    check_monitoring(settings.training, launch_state().device)
    with stage(1, "tokenizer: byte-level BPE learnt from the corpus"):
        prepare_tokenizer(settings, run_dir)
    with stage(2, "data: the corpus as token shards, some of it held out"):
        prepare_data(settings, run_dir)


def held_out_prompts(settings: QuickstartSettings) -> list[str]:
    """The first words of a few sentences that training never sees."""
    _, held_out, _ = split_documents(settings)
    sentences = [s for s in sentences_of(islice(held_out, 200)) if len(s.split()) > 2 * PROMPT_WORDS]
    if not sentences:
        return ["The"] * PROMPTS
    places = [len(sentences) * (2 * i + 1) // (2 * PROMPTS) for i in range(PROMPTS)]
    return [" ".join(sentences[place].split()[:PROMPT_WORDS]) for place in places]


def pretrain(settings: QuickstartSettings, run_dir: Path, prompts: list[str], started: float) -> None:
    from scratch_gpt.inference.generate import samples
    from scratch_gpt.looks import looks_at
    from scratch_gpt.training.pretrain import Pretraining

    with stage(3, "pretraining"):
        budget = settings.minutes * 60 - (time.perf_counter() - started) - RESERVED_SECONDS
        run = Pretraining(settings, run_dir, budget_seconds=budget, looks=looks_at(settings))
        if settings.max_steps is None:
            seconds_left = settings.minutes * 60 - (time.perf_counter() - started) - RESERVED_SECONDS
            settings.max_steps = run.steps_in(seconds_left)
            record_settings(run_dir, settings)
        if run.checkpoint is None:
            print0("\nbefore training it continues like this:")
            for text in samples(run.model, run.tokenizer, prompts, settings.seed):
                print0(f"  > {printable(text)}")
            run.model.train()
            print0()
    run.run()


def examine(settings: QuickstartSettings, run_dir: Path, prompts: list[str]) -> dict[str, Any]:
    """Look at the finished model from outside: samples, a reload elsewhere, the benchmark, the card."""
    from scratch_gpt.evaluation.evaluate import describe, evaluate
    from scratch_gpt.inference.generate import samples
    from scratch_gpt.model.loading import load_model
    from scratch_gpt.publishing.model_card import write_model_card
    from scratch_gpt.publishing.verify import reload_elsewhere
    from scratch_gpt.training.metrics import read_events, read_metrics
    from scratch_gpt.training.spike_guard import summarize_events

    final = run_dir / "final"
    model, tokenizer = load_model(str(final))
    _, held_out, how = split_documents(settings)
    texts = list(held_out)

    with stage(4, "samples: the same beginnings, continued by the trained model"):
        texts_written = samples(model, tokenizer, prompts, settings.seed)
        for text in texts_written:
            print0(f"  > {printable(text)}")

    with stage(5, f"reload: {final} in a new process that cannot import scratch_gpt"):
        difference = reload_elsewhere(final, model, tokenizer, " ".join(texts[0].split()[:60]))
        if difference != 0.0:
            raise RuntimeError(f"the logits differ by {difference} after the reload: the saved model is not the model")
        print0("AutoModelForCausalLM and AutoTokenizer loaded it there, and its logits are equal, bit for bit")

    with stage(6, "benchmark: the lm-eval harness on questions made from the held-out text"):
        evaluation = evaluate(
            model, tokenizer, texts, task_folder=run_dir / "evaluation" / "tasks", limit=QUESTIONS, seed=settings.seed
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
            samples=texts_written,
            training={
                "corpus": " and ".join(entry["source"] for entry in manifest["sources"].values()),
                "train_tokens": totals(manifest, "train")["tokens"],
                "train_bytes": totals(manifest, "train")["bytes"],
                "tokens_seen": records[-1]["tokens"],
                "steps": records[-1]["step"],
                "precision": state["precision"],
                "training_time": format_duration(training_seconds) + " minutes",
                "seed": settings.seed,
                "guard": summarize_events(read_events(run_dir / "metrics.jsonl")) or "had nothing to do",
            },
        )
        print0(f"model card {final}/README.md")
    return {
        **evaluation.as_dict(),
        "held_out": how,
        "num_parameters": model.num_parameters(),
        "tokens_seen": records[-1]["tokens"],
        "training_seconds": training_seconds,
        "reload_difference": difference,
        "samples": texts_written,
    }


def closing_lines(run_dir: Path, results: dict[str, Any]) -> None:
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
