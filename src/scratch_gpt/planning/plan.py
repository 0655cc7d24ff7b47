"""`scratch-gpt plan`: what a run will compute, need and cost, and which layout of the devices to choose.

    scratch-gpt plan --config run.yaml --devices 8 --device-memory 80GB --peak-flops 990e12 --price 3

Prints the number of parameters, FLOPs per token, the memory of each device for each layout, the largest device batch
that fits, tokens per second, hours and cost, and the simplest layout that fits. GB are 10^9 bytes.
"""

from collections.abc import Iterator

from scratch_gpt.config import PlanSettings
from scratch_gpt.console import print0
from scratch_gpt.planning.activations import Precision
from scratch_gpt.planning.dry_run import dry_run
from scratch_gpt.planning.layouts import SIMPLE_LAYOUTS
from scratch_gpt.planning.memory import GB
from scratch_gpt.planning.planner import USABLE_MEMORY, LayoutEstimate, Plan

TOKENS_PER_PARAMETER = 20
"""Compute-optimal training: Hoffmann et al., 2022, arXiv:2203.15556 ("Chinchilla", tables 2 and 3)."""
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "temporary", "communication")


def plan_command(settings: PlanSettings) -> None:
    """`scratch-gpt plan`."""
    for line in describe(Plan(settings)):
        print0(line)


def describe(plan: Plan) -> Iterator[str]:
    """The printed lines."""
    yield from _describe_model(plan)
    precision = plan.settings.training.precision
    precisions: list[Precision] = ["bf16", "fp32"] if precision == "auto" else [precision]
    estimates = {each: plan.estimates(each) for each in precisions}
    yield (
        f"memory     in GB (10^9 bytes) on each of {plan.settings.devices} {plan.device} device(s); a layout fits if its "
        f"total is at most {USABLE_MEMORY:.0%} of {plan.device_bytes / GB:.1f} GB"
    )
    for each in precisions:
        yield ""
        note = "everything in float32" if each == "fp32" else "autocast; weights, gradients and optimizer stay float32"
        yield f"{each}: {note}"
        yield from _memory_table(plan, estimates[each])
    chosen = plan.choose(estimates[precisions[0]])
    yield ""
    yield from _describe_choice(plan, chosen, estimates[precisions[0]])
    if plan.settings.dry_run and chosen is not None:
        yield _describe_dry_run(plan, chosen)


def _describe_model(plan: Plan) -> Iterator[str]:
    config, parameters, flops, preset = plan.config, plan.parameters, plan.flops, plan.settings.model.preset
    in_blocks = parameters.total - parameters.embeddings - parameters.head
    head = "shared with the head" if not parameters.head else f"{parameters.head:,} in the head"
    yield (
        f"model      {preset}: {parameters.total:,} parameters, {parameters.embeddings:,} in embeddings "
        f"({head}) and {in_blocks:,} in {config.num_hidden_layers} blocks and the final norm"
    )
    yield (
        f"           vocabulary {config.vocab_size:,} ({plan.vocabulary_source}), context length {plan.context_length:,}"
    )
    weights = round(flops.matrices / 6)
    yield (
        f"FLOPs      {flops.total:,.0f} per token, forward and backward = 6 x {weights:,} weights in matrix products"
        f" + 12 x {config.num_hidden_layers} layers x {plan.context_length:,} context x "
        f"{config.num_attention_heads * config.head_dim:,} (attention)"
    )


def _memory_table(plan: Plan, estimates: list[LayoutEstimate]) -> Iterator[str]:
    """One line for each layout; numbers are right-aligned."""
    header = ["layout", "checkpointing", "batch", *MEMORY_PARTS, "total", "fits", "largest batch", "tokens/s"]
    lines = [header]
    for estimate in estimates:
        rate = plan.tokens_per_second(estimate)
        lines.append(
            [
                estimate.layout.name,
                "full" if estimate.workload.checkpointing else "none",
                f"{estimate.workload.sequences:,}",
                *(f"{getattr(estimate.memory, part) / GB:,.2f}" for part in MEMORY_PARTS),
                f"{estimate.memory.total / GB:,.2f}",
                "yes" if estimate.fits else "no",
                f"{estimate.max_batch_size:,}",
                "-" if rate is None else f"{rate:,.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _describe_choice(plan: Plan, chosen: LayoutEstimate | None, estimates: list[LayoutEstimate]) -> Iterator[str]:
    settings = plan.settings
    if chosen is None:
        smallest = min(estimates, key=lambda estimate: estimate.memory.total)
        yield (
            f"layout     none fits: {smallest.layout.name} needs the least, {smallest.memory.total / GB:.1f} GB of "
            f"{plan.device_bytes / GB:.1f} GB. Use more devices, devices with more memory, a smaller "
            "--training.context_length or a smaller model"
        )
    else:
        yield from _describe_layout(plan, chosen, estimates)
    requested = settings.tokens or settings.max_steps * settings.training.total_batch_size
    yield f"this run   {requested:,.0f} tokens: {_time_and_cost(plan, chosen, requested)}"
    optimal = TOKENS_PER_PARAMETER * plan.parameters.total
    yield (
        f"optimal    {optimal:,.0f} tokens, {TOKENS_PER_PARAMETER} per parameter (Hoffmann et al. 2022): "
        f"{_time_and_cost(plan, chosen, optimal)}"
    )


def _describe_layout(plan: Plan, chosen: LayoutEstimate, estimates: list[LayoutEstimate]) -> Iterator[str]:
    layout, batch_size = chosen.layout, plan.device_batch_size(chosen)
    checkpointing = "with" if chosen.workload.checkpointing else "without"
    yield (
        f"layout     {layout.name} ({layout.description}) {checkpointing} activation checkpointing, "
        f"--training.device_batch_size {batch_size}: {_reason(plan, chosen, estimates)}"
    )
    sequences_per_step = plan.sequences_per_step(layout)
    if sequences_per_step is None:
        yield (
            f"           --training.total_batch_size {plan.settings.training.total_batch_size:,} is not a multiple of "
            f"{plan.context_length:,} (context length) x {layout.dp_size} (data-parallel ranks), as pretrain requires: "
            f"set it to {batch_size * plan.context_length * layout.dp_size:,} or a multiple of that"
        )
    elif batch_size:
        micro_batches = sequences_per_step // batch_size
        yield f"           {micro_batches:,} micro-batch(es) per step on each of {layout.dp_size} data-parallel rank(s)"


def _reason(plan: Plan, chosen: LayoutEstimate, estimates: list[LayoutEstimate]) -> str:
    """Why the layout was chosen: the simpler layouts that do not fit, if there are any."""
    too_large = []
    for estimate in estimates:
        name, checkpointing = estimate.layout.name, estimate.workload.checkpointing
        if (estimate.layout, checkpointing) == (chosen.layout, chosen.workload.checkpointing):
            break
        simpler = name in SIMPLE_LAYOUTS and (name != "single" or plan.settings.devices == 1)
        if simpler and not plan.device_batch_size(estimate):
            too_large.append(name + (" with checkpointing" if checkpointing else ""))
    if too_large:
        return f"the simplest that fits; too large: {', '.join(too_large)}"
    return "the simplest that fits" + (" and uses all devices" if plan.settings.devices > 1 else "")


def _time_and_cost(plan: Plan, chosen: LayoutEstimate | None, tokens: float) -> str:
    rate = plan.tokens_per_second(chosen) if chosen else None
    if chosen is None or rate is None:
        hint = "" if plan.settings.peak_flops else " (give --peak-flops, the peak FLOP/s of a device)"
        return f"time unknown{hint}"
    hours = tokens / rate / 3600
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    cost = ""
    if plan.settings.price is not None:
        cost = f", cost {hours * plan.settings.price * chosen.layout.devices:,.2f}"
    return f"{time} at {rate:,.0f} tokens/s ({plan.settings.mfu:.0%} of peak FLOP/s){cost}"


def _describe_dry_run(plan: Plan, chosen: LayoutEstimate) -> str:
    layout = chosen.layout
    if not layout.gathers_weights:
        return f"dry run    skipped: it supports layouts that shard the weights (fsdp2, hsdp), not {layout.name}"
    replicas = layout.dp_size // layout.weight_shards
    mesh = {"dp_replicate": replicas, "dp_shard": layout.weight_shards, "tp": layout.tensor_parallel}
    mesh = {name: size for name, size in mesh.items() if size > 1}
    measured = dry_run(plan.config, mesh, chosen.workload.precision, plan.settings.training)
    parts = [
        f"{getattr(measured, part) / GB:,.3f} GB of {part} ({getattr(chosen.memory, part) / GB:,.3f} planned)"
        for part in ("weights", "gradients", "optimizer")
    ]
    return f"dry run    after one step, the first of {layout.devices:,} devices holds {', '.join(parts)}"
