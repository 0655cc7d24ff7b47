"""Format results.json as tables.

    python examples/stories/tables.py runs/stories/results.json

Where a step ran with several seeds, a number is their mean, followed by the lowest and the highest.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def to_markdown(results: Results) -> str:
    """Format the tables of the steps that are done."""
    tables = [
        fine_tuning(results),
        reward_models(results),
        policies("From the reward model", results, ["dpo", "ppo"]),
        policies("From the checks", results, ["checks-dpo", "checks-ppo", "checks-grpo"]),
    ]
    return "\n".join(table for table in tables if table)


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [" | ".join(["", *head, ""]), "|".join(["", "---", *["---:"] * (len(head) - 1), ""])]
    lines += [" | ".join(["", *row, ""]) for row in rows]
    return f"## {title}\n\n" + "\n".join(line.strip() for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{value:.1%}"


def with_interval(proportion: dict[str, Any]) -> str:
    low, high = proportion["interval"]
    return f"{proportion['share']:.1%} ({low:.1%} to {high:.1%})"


def fine_tuning(results: Results) -> str:
    shown = []
    if "base" in results:
        shown += [("base, asked in the same way", results["base"]["asked_like_sft"], None)]
        shown += [("base, after two examples", results["base"]["with_two_examples"], None)]
    if "sft" in results:
        shown[0] = (*shown[0][:2], results["sft"]["validation_loss_before"])
        shown += [("fine-tuned", results["sft"]["asked"], results["sft"]["validation_loss"])]
    demands = ["words", "hero", "begins_with", "ends_with", "sentences"]
    head = [
        "",
        "validation loss",
        "requests obeyed (95% interval)",
        *[name.replace("_", " ") for name in demands],
        "tokens",
        "ended",
    ]
    rows = [
        [
            name,
            "" if loss is None else f"{loss:.3f}",
            with_interval(asked["obeyed"]),
            *[percent(asked["obeyed_by_demand"][demand]) for demand in demands],
            f"{asked['mean_length']:.1f}",
            percent(asked["ended"]),
        ]
        for name, asked, loss in shown
    ]
    return table("Supervised fine-tuning", head, rows)


def reward_models(results: Results) -> str:
    rows = []
    for name in ("reward", "judge"):
        if name in results:
            report, kinds = results[name]["report"], results[name]["kinds"]
            low, high = report["accuracy_95"]
            rows.append(
                [
                    {"reward": "reward model", "judge": "judge"}[name],
                    f"{report['accuracy']:.1%} ({low:.1%} to {high:.1%})",
                    *[percent(kinds[kind]["share"]) if kind in kinds else "" for kind in KINDS],
                    percent(report["accuracy_of_the_longer_side"]),
                    f"{report['calibration_error']:.3f}",
                    f"{report['pairs']:,}",
                ]
            )
    head = ["", "accuracy (95% interval)", *KINDS, "by length alone", "calibration error", "held-out pairs"]
    return table("Reward model", head, rows)


KINDS = ("swapped", "shuffled", "sampled")


def policies(title: str, results: Results, methods: list[str]) -> str:
    """Compare the fine-tuned model with what each method made of it; a method has one run, or one for each of several seeds."""
    runs_of = {name: runs for name in methods if (runs := [results[step] for step in results if is_run(step, name)])}
    if not runs_of:
        return ""
    asked = results["sft"]["asked"]
    rows = [
        ["fine-tuned", "1", percent(asked["obeyed"]["share"]), percent(asked["demands_met"]), "50.0%", "50.0%"]
        + [f"{asked['mean_length']:.1f}", percent(asked["ended"]), percent(asked["distinct_pairs"]), "0.0", ""]
    ]
    for name, runs in runs_of.items():
        rows.append(
            [
                name.removeprefix("checks-").upper(),
                str(len(runs)),
                mean_and_range([run["asked"]["obeyed"]["share"] for run in runs], "{:.1%}"),
                mean_and_range([run["asked"]["demands_met"] for run in runs], "{:.1%}"),
                mean_and_range([run["against_sft"]["judge"]["wins"]["share"] for run in runs], "{:.1%}"),
                mean_and_range([run["against_sft"]["reward"]["wins"]["share"] for run in runs], "{:.1%}"),
                mean_and_range([run["asked"]["mean_length"] for run in runs], "{:.1f}"),
                mean_and_range([run["asked"]["ended"] for run in runs], "{:.1%}"),
                mean_and_range([run["asked"]["distinct_pairs"] for run in runs], "{:.1%}"),
                mean_and_range([run["asked"]["kl"] for run in runs], "{:.1f}"),
                mean_and_range([cost(run) / 60 for run in runs if not run["resumed"]], "{:.0f}"),
            ]
        )
    head = ["", "seeds", "requests obeyed", "demands met", "wins by the judge", "wins by the reward model", "tokens"]
    return table(title, [*head, "ended", "distinct pairs", "KL (nats)", "minutes of a core"], rows)


def cost(run: dict[str, Any]) -> float:
    """Return the CPU seconds of a run, including those in which the texts it learns from were generated."""
    return run["training_processor_seconds"] + run.get("drawing_seconds", 0)


def is_run(step: str, name: str) -> bool:
    """Return whether ``step`` is a run of the method ``name``: `ppo-3` is a run of `ppo`, `checks-ppo-3` is not."""
    return step == name or (step.startswith(f"{name}-") and step.removeprefix(f"{name}-").isdigit())


def mean_and_range(values: list[float], template: str) -> str:
    """Format the mean and, of several values, the lowest and the highest."""
    if not values:
        return ""
    mean = template.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({template.format(min(values))} to {template.format(max(values))})"


if __name__ == "__main__":
    print(to_markdown(json.loads(Path(sys.argv[1]).read_text())))
