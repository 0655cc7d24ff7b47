"""A run on paper: what it computes, holds, takes and costs, and which layout of the devices to choose.

    scratch-gpt plan --config run.yaml --devices 8 --device-memory 80GB --peak-flops 990e12 --price 3

It prints the number of parameters, FLOPs per token, the memory of each device by part for each layout, the largest device
batch that fits, tokens per second, hours and cost, and the simplest layout that fits. `footprint.py` has the formulas of
one device. Memory is measured in GB of 10^9 bytes throughout.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from scratch_gpt.config import FindBatchSizeSettings, PlanSettings, parse_bytes
from scratch_gpt.console import print0
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.flops import flops_per_token
from scratch_gpt.model.loading import build_config, build_config_without_tokenizer
from scratch_gpt.planning import memory as footprint
from scratch_gpt.planning.dry_run import dry_run
from scratch_gpt.planning.memory import FP32, Parameters, Precision, Workload

GB = 1e9
FILL = 0.92
"""Share of a device's memory that a plan fills. The rest is for the device's context and for gaps between tensors."""
TOKENS_PER_PARAMETER = 20
"""Compute-optimal training: Hoffmann et al., 2022, arXiv:2203.15556 ("Chinchilla", tables 2 and 3)."""
LARGEST_BATCH = 2**20


# ------------------------------------------------------------------------------------------------ layouts


@dataclass(frozen=True)
class Layout:
    """How one model lies on the devices."""

    name: str
    devices: int
    what: str
    weight_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    tensor_parallel: int = 1
    deepspeed: bool = False

    @property
    def replicas(self) -> int:
        """Devices, or tensor-parallel groups, that each take rows of their own."""
        return self.devices // self.tensor_parallel

    @property
    def gathers_weights(self) -> bool:
        return self.weight_shards > 1


def layouts(config: ScratchGPTConfig, devices: int, per_node: int) -> list[Layout]:
    """From simple to elaborate; those that are possible with this number of devices and heads."""
    found = [Layout("single", 1, "one device")]
    if devices == 1:
        return found
    found += [
        Layout("ddp", devices, "a whole copy on each device"),
        Layout("zero1", devices, "DeepSpeed: optimizer split", optimizer_shards=devices, deepspeed=True),
        Layout(
            "zero2",
            devices,
            "DeepSpeed: optimizer and gradients split",
            gradient_shards=devices,
            optimizer_shards=devices,
            deepspeed=True,
        ),
        Layout("zero3", devices, "DeepSpeed: all split", devices, devices, devices, deepspeed=True),
        Layout("fsdp2", devices, "weights, gradients and optimizer split over all devices", devices, devices, devices),
    ]
    if devices > per_node and devices % per_node == 0:
        what = f"split inside each node of {per_node}, copied over {devices // per_node} nodes"
        found.append(Layout("hsdp", devices, what, per_node, per_node, per_node))
    tensor_parallel = math.gcd(
        math.gcd(devices, per_node), config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    )
    if tensor_parallel > 1:
        rest = devices // tensor_parallel
        name = f"tp{tensor_parallel}" if rest == 1 else f"fsdp2 x tp{tensor_parallel}"
        what = f"heads and MLP split over {tensor_parallel}" + (f", all that over {rest} groups" if rest > 1 else "")
        found.append(Layout(name, devices, what, rest, rest, rest, tensor_parallel))
    return found


ORDER = ("single", "ddp", "fsdp2", "hsdp")
"""The simple ones first; then whatever splits more. ZeRO needs another package and shards the same."""


# ------------------------------------------------------------------------------------------------ memory of one device


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What the blocks save for the backward pass; in bf16 and fp16 with autocast's copies of their weights."""
    loss: float
    """The gradients that the chunked loss computes ahead."""
    temporary: float
    """A chunk of logits, or the gradients inside one block, or a block that is computed again: the largest of them."""
    communication: float
    """Buckets of gradients, and weights that are gathered from the other devices."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(
    config: ScratchGPTConfig, parameters: Parameters, layout: Layout, load: Workload, optimizer: str = "adamw"
) -> Memory:
    """Of a step with gradient accumulation, when the gradients of earlier forward passes are there in the next one.

    Weights, gradients and AdamW's moments are float32. Where DeepSpeed leaves every process the whole weights, it has a copy
    of those that the process updates beside the moments.
    """
    load = replace(load, tensor_parallel=layout.tensor_parallel)
    held = parameters.held(tensor_parallel=layout.tensor_parallel)

    def part(shards: int) -> float:
        if layout.deepspeed:  # all parameters in one row, cut into equal pieces
            return held / shards
        return parameters.held(shards, layout.tensor_parallel)

    if layout.deepspeed:
        state = footprint.optimizer_bytes(parameters, optimizer) / layout.optimizer_shards
        state += 0 if layout.gathers_weights else FP32 * part(layout.optimizer_shards)
    else:
        state = footprint.optimizer_bytes(parameters, optimizer, layout.optimizer_shards, layout.tensor_parallel)
    copies = not layout.gathers_weights
    return Memory(
        weights=FP32 * part(layout.weight_shards),
        gradients=FP32 * part(layout.gradient_shards),
        optimizer=state,
        activations=footprint.bytes_of(footprint.saved_for_backward(config, load, copies), load),
        loss=_loss(config, load),
        temporary=footprint.temporary(config, load, copies),
        communication=_communication(layout, parameters, load, held),
    )


def _loss(config: ScratchGPTConfig, load: Workload) -> float:
    if load.tensor_parallel > 1:
        return 0.0  # the head is split and the loss not chunked: its logits are among what is temporary
    return footprint.bytes_of(footprint.saved_by_loss(config), load)


def _communication(layout: Layout, parameters: Parameters, load: Workload, held: float) -> float:
    """What a layout holds in order to send it.

    ddp: buckets for all gradients (`gradient_as_bucket_view` would save them). fsdp2: embeddings and head gathered in
    float32 throughout, one block in use and the next on its way, and the whole gradients of a block, which are copied to
    float32 before they are added up. DeepSpeed: buckets as `zero.py` sets them, a block each; zero3 gathers as fsdp2 does, but
    in float32, and has two buckets.
    """
    if layout.deepspeed:
        outside = float(parameters.embeddings + parameters.head)
        block = float(parameters.largest_block)
        return FP32 * (outside + 2 * block + 2 * block if layout.gathers_weights else block)
    if layout.gathers_weights:
        outside = (parameters.embeddings + parameters.head) / layout.tensor_parallel
        block = parameters.largest_block / layout.tensor_parallel
        return FP32 * outside + load.matmul_bytes * 2 * block + (FP32 + load.matmul_bytes) * block
    return FP32 * held if layout.replicas > 1 else 0.0


def largest_batch(needed: Callable[[int], float], available: float) -> int:
    """The most rows for which `needed(rows)` bytes are available; 0 if not even one row fits."""
    low, high = 0, 1
    while high <= LARGEST_BATCH and needed(high) <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= available else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Row:
    """One layout with or without activation checkpointing."""

    layout: Layout
    load: Workload
    memory: Memory
    fits: bool
    largest: int
    """Rows of the largest device batch."""


class Plan:
    """What `scratch-gpt plan` prints.

    Raises:
        UserError: settings that contradict each other, or memory that is no amount.
    """

    def __init__(self, settings: PlanSettings):
        self.settings = settings
        self.config, self.vocabulary = planned_config(settings)
        self.parameters = footprint.count(self.config)
        self.context = planned_context(settings, self.config)
        self.flops = flops_per_token(self.config, self.context)
        self.device: Literal["cuda", "cpu"] = _device(settings)
        self.device_bytes = _device_bytes(settings, self.device)
        self.optimizer: str = settings.training.optimizer

    def rows(self, precision: Precision) -> list[Row]:
        """Every layout, without and with activation checkpointing, at the device batch that `pretrain` would take."""
        return [
            self.row(layout, precision, checkpointing)
            for layout in layouts(self.config, self.settings.devices, self.settings.devices_per_node)
            for checkpointing in (False, True)
        ]

    def row(self, layout: Layout, precision: Precision, checkpointing: bool) -> Row:
        batch = self.settings.training.device_batch_size or self.rows_per_step(layout) or 1
        load = Workload(batch, self.context, precision, self.device, checkpointing)

        def at(rows: int) -> Memory:
            return memory(self.config, self.parameters, layout, replace(load, rows=rows), self.optimizer)

        available = FILL * self.device_bytes
        largest = largest_batch(lambda rows: at(rows).total, available)
        return Row(layout, load, at(batch), at(batch).total <= available, largest)

    def rows_per_step(self, layout: Layout) -> int | None:
        """Rows of one optimizer step on each replica, or None where the total does not divide."""
        rows, remainder = divmod(self.settings.training.total_batch_size, self.context * layout.replicas)
        return rows if rows and not remainder else None

    def device_batch(self, row: Row) -> int:
        """The given device batch, or the largest one that fits and divides the rows of a step; 0 if none fits."""
        given = self.settings.training.device_batch_size
        if given:
            return given if given <= row.largest else 0
        per_step = self.rows_per_step(row.layout)
        if per_step is None:
            return row.largest
        return max((rows for rows in range(1, min(row.largest, per_step) + 1) if per_step % rows == 0), default=0)

    def choice(self, rows: list[Row]) -> Row | None:
        """The simplest layout that fits, and checkpointing only where it does not fit without."""
        rows = [row for row in rows if not row.layout.deepspeed]
        if self.settings.devices > 1:
            rows = [row for row in rows if row.layout.name != "single"]
        rows.sort(key=lambda row: ORDER.index(row.layout.name) if row.layout.name in ORDER else len(ORDER))
        return next((row for row in rows if self.device_batch(row)), None)

    def tokens_per_second(self, row: Row) -> float | None:
        """MFU counts the work that is needed; what checkpointing computes again takes time and does not count."""
        if self.settings.peak_flops is None:
            return None
        computed = self.flops.total + (self.flops.recomputed if row.load.checkpointing else 0)
        return row.layout.devices * self.settings.peak_flops * self.settings.mfu / computed


def planned_config(settings: PlanSettings | FindBatchSizeSettings) -> tuple[ScratchGPTConfig, str]:
    """The model of a run that has not begun, and where its vocabulary comes from.

    Raises:
        UserError: an unknown model, or a layout that the plan knows nothing of.
    """
    if settings.parallel.pipeline > 1:
        raise UserError("plan and find-batch-size know nothing of pipelines: leave --parallel.pipeline at 1")
    if settings.tokenizer_path is not None:
        tokenizer = load_tokenizer(Path(settings.tokenizer_path))
        return build_config(settings.model, tokenizer), f"of {settings.tokenizer_path}"
    if settings.tokenizer.vocab_size is None:
        return build_config_without_tokenizer(settings.model), "the preset's; pretrain asks --tokenizer.vocab_size"
    return build_config_without_tokenizer(
        settings.model, vocab_size=settings.tokenizer.vocab_size
    ), "--tokenizer.vocab_size"


def planned_context(settings: PlanSettings | FindBatchSizeSettings, config: ScratchGPTConfig) -> int:
    context = settings.training.context_length or config.max_position_embeddings
    if config.position_embedding_type == "learned" and context > config.max_position_embeddings:
        raise UserError(
            f"--training.context_length is {context}, the model has {config.max_position_embeddings} learned positions"
        )
    return context


def _device(settings: PlanSettings) -> Literal["cuda", "cpu"]:
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.device_memory is not None or torch.cuda.is_available() else "cpu"


def _device_bytes(settings: PlanSettings, device: str) -> int:
    if settings.device_memory is not None:
        return parse_bytes(settings.device_memory, "device-memory")
    if device == "cpu":
        return psutil.virtual_memory().total // settings.devices
    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU to ask for its memory: say --device-memory 80GB, or --device cpu")
    return torch.cuda.get_device_properties(0).total_memory


# ------------------------------------------------------------------------------------------------ in words


def plan_command(settings: PlanSettings) -> None:
    """`scratch-gpt plan`."""
    for line in describe(Plan(settings)):
        print0(line)


def describe(plan: Plan) -> Iterator[str]:
    """The lines of the answer."""
    yield from _describe_model(plan)
    precision = plan.settings.training.precision
    precisions: list[Precision] = ["bf16", "fp32"] if precision == "auto" else [precision]
    tables = {each: plan.rows(each) for each in precisions}
    yield (
        f"memory     of each of {plan.settings.devices} {plan.device} device(s), in GB of 10^9 bytes; fits: {FILL:.0%} of "
        f"{plan.device_bytes / GB:.1f}"
    )
    for each, rows in tables.items():
        yield ""
        note = "everything in float32" if each == "fp32" else "autocast; weights, gradients and optimizer stay float32"
        yield f"{each}: {note}"
        yield from _table(plan, rows)
    chosen = plan.choice(tables[precisions[0]])
    yield ""
    yield from _describe_choice(plan, chosen, tables[precisions[0]])
    if plan.settings.dry_run and chosen is not None:
        yield _rehearse(plan, chosen)


def _rehearse(plan: Plan, chosen: Row) -> str:
    layout = chosen.layout
    if not layout.gathers_weights:
        return f"dry run    {layout.name} is not rehearsed, only fsdp2 and hsdp are"
    copies = layout.replicas // layout.weight_shards
    sizes = {"dp_replicate": copies, "dp_shard": layout.weight_shards, "tp": layout.tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    held = dry_run(plan.config, sizes, chosen.load.precision, plan.settings.training)
    parts = [
        f"{getattr(held, part) / GB:,.3f} GB of {part} ({getattr(chosen.memory, part) / GB:,.3f} planned)"
        for part in ("weights", "gradients", "optimizer")
    ]
    return f"dry run    after a step the first of {layout.devices:,} devices holds {', '.join(parts)}"


def _describe_model(plan: Plan) -> Iterator[str]:
    config, parameters, flops, settings = plan.config, plan.parameters, plan.flops, plan.settings
    rest = parameters.total - parameters.embeddings - parameters.head
    head = "tied head" if not parameters.head else f"{parameters.head:,} in the head"
    yield (
        f"model      {settings.model.preset}: {parameters.total:,} parameters, {parameters.embeddings:,} in embeddings "
        f"({head}) and {rest:,} in {config.num_hidden_layers} blocks and the final norm"
    )
    yield f"           vocabulary {config.vocab_size:,} ({plan.vocabulary}), context {plan.context:,}"
    weights = round(flops.matrices / 6)
    yield (
        f"FLOPs      {flops.total:,.0f} per token, forward and backward = 6 x {weights:,} weights in matrix products"
        f" + 12 x {config.num_hidden_layers} layers x {plan.context:,} context x "
        f"{config.num_attention_heads * config.head_dim:,} (attention)"
    )


def _table(plan: Plan, rows: list[Row]) -> Iterator[str]:
    parts = ["weights", "gradients", "optimizer", "activations", "loss", "temporary", "communication"]
    heads = ["layout", "checkpointing", "rows", *parts, "total", "fits", "largest batch", "tokens/s"]
    cells = [
        [
            row.layout.name,
            "full" if row.load.checkpointing else "none",
            f"{row.load.rows:,}",
            *(f"{getattr(row.memory, part) / GB:,.2f}" for part in parts),
            f"{row.memory.total / GB:,.2f}",
            "yes" if row.fits else "no",
            f"{row.largest:,}",
            _number(plan.tokens_per_second(row)),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    for line in [heads, *cells]:
        words = [
            word.ljust(width) if column < 2 else word.rjust(width)
            for column, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(words).rstrip()


def _describe_choice(plan: Plan, chosen: Row | None, rows: list[Row]) -> Iterator[str]:
    settings = plan.settings
    if chosen is None:
        least = min(rows, key=lambda row: row.memory.total)
        yield (
            f"layout     none fits: {least.layout.name} takes least, {least.memory.total / GB:.1f} GB of "
            f"{plan.device_bytes / GB:.1f}. Take more devices, devices with more memory, a smaller "
            "--training.context_length or a smaller model"
        )
    else:
        yield from _describe_layout(plan, chosen, rows)
    optimal = TOKENS_PER_PARAMETER * plan.parameters.total
    asked = settings.tokens or settings.max_steps * settings.training.total_batch_size
    for name, tokens in (("this run", asked), ("optimal", optimal)):
        note = f", {TOKENS_PER_PARAMETER} per parameter (Hoffmann et al. 2022)" if name == "optimal" else ""
        yield f"{name:<9}  {tokens:,.0f} tokens{note}: {_time_and_cost(plan, chosen, tokens)}"


def _describe_layout(plan: Plan, chosen: Row, rows: list[Row]) -> Iterator[str]:
    batch = plan.device_batch(chosen)
    per_step = plan.rows_per_step(chosen.layout)
    checkpointing = "with" if chosen.load.checkpointing else "without"
    yield (
        f"layout     {chosen.layout.name} ({chosen.layout.what}) {checkpointing} activation checkpointing, "
        f"--training.device_batch_size {batch}: {_why(plan, chosen, rows)}"
    )
    if per_step is None:
        step = batch * plan.context * chosen.layout.replicas
        yield (
            f"           --training.total_batch_size {plan.settings.training.total_batch_size:,} is no multiple of "
            f"{plan.context:,} (context) x {chosen.layout.replicas} (replicas), which pretrain refuses: give "
            f"{step:,} or a multiple of it"
        )
    elif batch:
        yield f"           {per_step // batch:,} forward pass(es) a step on each of {chosen.layout.replicas} replica(s)"


def _why(plan: Plan, chosen: Row, rows: list[Row]) -> str:
    """Names the simpler ones that did not fit."""
    failed = []
    for row in rows:
        if row.layout == chosen.layout and row.load.checkpointing == chosen.load.checkpointing:
            break
        simpler = row.layout.name in ORDER and (row.layout.name != "single" or plan.settings.devices == 1)
        if simpler and not plan.device_batch(row):
            failed.append(row.layout.name + (" with checkpointing" if row.load.checkpointing else ""))
    if failed:
        return f"{', '.join(failed)} would not fit"
    return "the simplest that fits" + (" and uses all devices" if plan.settings.devices > 1 else "")


def _time_and_cost(plan: Plan, chosen: Row | None, tokens: float) -> str:
    rate = plan.tokens_per_second(chosen) if chosen else None
    if chosen is None or rate is None:
        return "time unknown" + ("" if plan.settings.peak_flops else " (give --peak-flops, the peak of a device)")
    hours = tokens / rate / 3600
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    cost = ""
    if plan.settings.price is not None:
        cost = f", cost {hours * plan.settings.price * chosen.layout.devices:,.2f}"
    return f"{time} at {rate:,.0f} tokens/s ({plan.settings.mfu:.0%} of the peak){cost}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
