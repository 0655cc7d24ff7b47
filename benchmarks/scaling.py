"""Predicted pretraining on 8 to 4,096 H100s: the layout, memory and communication of a device, and the MFU.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md, which explains the formulas and names their sources. Memory and FLOPs come from
`scratch_gpt.planning`; nothing here was run on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.flops import Flops, flops_per_token
from scratch_gpt.model.presets import preset
from scratch_gpt.planning.activations import BF16, FP32, Workload
from scratch_gpt.planning.layouts import Layout
from scratch_gpt.planning.memory import GB, MemoryEstimate, estimate_memory
from scratch_gpt.planning.parameters import ParameterCounts, parameter_counts
from scratch_gpt.planning.planner import USABLE_MEMORY

DEVICE_MEMORY, PEAK_FLOPS = 80e9, 989e12
"""Bytes and dense bf16 FLOP/s of an H100 SXM (data sheet)."""
NVLINK, NETWORK, DEVICES_PER_NODE = 450e9, 50e9, 8
"""Bytes per second of a device in one direction: NVLink 4, and one 400 Gb/s network port per device."""
DEVICES = (8, 64, 512, 4096)
NEARLY_FASTEST = 0.99
"""A simpler layout is chosen if it reaches this fraction of the fastest one's speed."""

LLAMA_8B = preset("modern-7b", vocab_size=128256, qk_norm=False)
LLAMA_70B = preset(
    "modern-7b",
    vocab_size=128256,
    num_hidden_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    qk_norm=False,
)


@dataclass(frozen=True)
class Model:
    config: ScratchGPTConfig
    context: int
    tokens: int
    """Desired tokens per step; more where every data-parallel rank needs at least one sequence."""

    @cached_property
    def parameters(self) -> ParameterCounts:
        return parameter_counts(self.config)

    @cached_property
    def flops(self) -> Flops:
        return flops_per_token(self.config, self.context)


MODELS = {
    "124M": Model(preset("gpt2"), 1024, 2**19),
    "1B": Model(preset("modern-1b"), 8192, 2**22),
    "7B": Model(preset("modern-7b"), 8192, 2**22),
    "70B": Model(LLAMA_70B, 8192, 2**22),
}
LARGE_BATCH = 2**24
"""Tokens per step at the end of Llama 3 405B's training."""


# ------------------------------------------------------------------------------------------------ communication volume


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that a device sends in a step."""

    shards: float
    """All-gathers of weights and reduce-scatters of gradients within one replica."""
    copies: float
    """All-reduces of gradients over the replicas."""
    tensor: float
    """All-reduces and all-gathers of tensor parallelism."""


def communication_volume(
    model: Model, layout: Layout, workload: Workload, micro_batches: int, megatron: bool = False
) -> CommunicationVolume:
    """The formulas of docs/scaling.md; ``megatron``: tensor parallelism communicates as in Megatron-LM."""
    shards, tensor = layout.weight_shards, layout.tensor_parallel
    replicas = layout.dp_size // shards
    outside = (model.parameters.embeddings + model.parameters.head) / tensor
    blocks = model.parameters.total / tensor - outside
    per_micro_batch = (2 * BF16 + FP32) * blocks + 2 * FP32 * outside
    per_token = tensor_parallel_volume_per_token(model.config, tensor, workload.checkpointing, megatron)
    return CommunicationVolume(
        shards=micro_batches * per_micro_batch * (shards - 1) / shards,
        copies=2 * FP32 * (blocks + outside) / shards * (replicas - 1) / replicas,
        tensor=micro_batches * workload.tokens * per_token,
    )


def tensor_parallel_volume_per_token(
    config: ScratchGPTConfig, tensor: int, checkpointing: bool, megatron: bool
) -> float:
    """Bytes that a device sends for each token.

    Forward, each block all-reduces hidden states twice, and once more if it is recomputed (recomputation stops before
    the second). Backward, in float32, it all-reduces once for each projection that reads the residual stream. Embedding
    and head add one each, and the logits are gathered. Megatron-LM all-reduces twice backward in 16 bits, and twice in
    recomputation.
    """
    if megatron:
        sums = config.hidden_size * config.num_hidden_layers * BF16 * (6 if checkpointing else 4)
        return 2 * sums * (tensor - 1) / tensor
    forward, backward = BF16 * (3 if checkpointing else 2), FP32 * (5 if config.mlp_type == "gated" else 4)
    sums = config.hidden_size * (config.num_hidden_layers * (forward + backward) + 2 * FP32)
    return (2 * sums + config.padded_vocab_size * BF16) * (tensor - 1) / tensor


def bandwidth(stride: int, members: int) -> float:
    """Bytes per second of a device in a ring of ``members`` devices that are ``stride`` apart.

    A ring crosses to the next node once for all of its members in a node, whose network ports work in parallel.
    """
    if stride * members <= DEVICES_PER_NODE:
        return NVLINK
    return min(NVLINK, NETWORK * max(1, DEVICES_PER_NODE // stride))


# ------------------------------------------------------------------------------------------------ time of a step


@dataclass(frozen=True)
class Step:
    """One optimizer step in one layout."""

    layout: Layout
    workload: Workload
    micro_batches: int
    memory: MemoryEstimate
    flops: float
    """FLOPs that the model needs, per device."""
    matmul_seconds: float
    """Time of the matrix products, at the measured efficiency of a run that hardly waits for communication."""
    volume: CommunicationVolume
    data_seconds: float
    """Communication that can overlap with matrix products."""
    tensor_seconds: float
    """Communication that the next matrix product waits for."""

    @property
    def tokens(self) -> int:
        return self.workload.tokens * self.micro_batches * self.layout.dp_size

    @property
    def mfu(self) -> tuple[float, float]:
        """Without any overlap of communication and matrix products, and with all that is possible."""
        not_overlapped = self.matmul_seconds + self.tensor_seconds
        ideal = self.flops / PEAK_FLOPS
        return ideal / (not_overlapped + self.data_seconds), ideal / max(not_overlapped, self.data_seconds)


def efficiency() -> float:
    """MFU of torchtitan's Llama 3.1 8B on one node: 6,667 tokens/s on each of 8 H100s."""
    return 6667 * flops_per_token(LLAMA_8B, 8192).total / PEAK_FLOPS


def predict_step(model: Model, layout: Layout, workload: Workload, micro_batches: int, megatron: bool = False) -> Step:
    tokens_per_device = workload.tokens * micro_batches / layout.tensor_parallel
    computed = model.flops.total + (model.flops.recomputed if workload.checkpointing else 0)
    volume = communication_volume(model, layout, workload, micro_batches, megatron)
    shards, tensor = layout.weight_shards, layout.tensor_parallel
    shards_seconds = volume.shards / bandwidth(tensor, shards)
    copies_seconds = volume.copies / bandwidth(tensor * shards, layout.dp_size // shards)
    return Step(
        layout,
        workload,
        micro_batches,
        memory=estimate_memory(model.config, model.parameters, layout, workload),
        flops=tokens_per_device * model.flops.total,
        matmul_seconds=tokens_per_device * computed / (efficiency() * PEAK_FLOPS),
        volume=volume,
        data_seconds=shards_seconds + copies_seconds,
        tensor_seconds=volume.tensor / bandwidth(1, tensor),
    )


# ------------------------------------------------------------------------------------------------ choice of a layout


def candidate_layouts(devices: int) -> Iterator[Layout]:
    """The layouts that `pretrain` supports, from simple to elaborate."""
    yield Layout("DDP", devices, "")
    for tensor in (1, DEVICES_PER_NODE):
        groups = devices // tensor
        suffix = f" x TP {tensor}" if tensor > 1 else ""
        if tensor > 1 and groups == 1:
            yield Layout(f"TP {tensor}", devices, "", tensor_parallel=tensor)
        for shards in (groups, *(2**power for power in range(1, 13) if 2**power < groups)):
            if shards * tensor < DEVICES_PER_NODE or shards == 1:
                continue
            name = f"FSDP2 {shards}" if shards == groups else f"HSDP {groups // shards} x {shards}"
            yield Layout(name + suffix, devices, "", shards, shards, shards, tensor)


def choose_step(model: Model, tokens: int, devices: int) -> Step | None:
    """The best layout that fits, or None.

    The fewest tokens at or above ``tokens``, then the fastest without overlap, then the simplest.
    """
    found = []
    for layout in candidate_layouts(devices):
        if model.config.num_key_value_heads % layout.tensor_parallel:
            continue
        sequences = max(1, tokens // (model.context * layout.dp_size))
        for checkpointing in (False, True):
            workload = Workload(1, model.context, checkpointing=checkpointing)
            fitting = [
                size
                for size in range(1, sequences + 1)
                if sequences % size == 0 and fits(model, layout, replace(workload, sequences=size))
            ]
            if fitting:
                largest = replace(workload, sequences=fitting[-1])
                found.append(predict_step(model, layout, largest, sequences // fitting[-1]))
    if not found:
        return None
    fewest = min(step.tokens for step in found)
    found = [step for step in found if step.tokens == fewest]
    fastest = max(step.mfu[0] for step in found)
    return next(step for step in found if step.mfu[0] >= NEARLY_FASTEST * fastest)


def fits(model: Model, layout: Layout, workload: Workload) -> bool:
    needed = estimate_memory(model.config, model.parameters, layout, workload).total
    return needed <= USABLE_MEMORY * DEVICE_MEMORY


# ------------------------------------------------------------------------------------------------ tables


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def millions(tokens: int) -> str:
    return f"{tokens / 2**20:g} Mi"


@cache
def chosen_step(name: str, tokens: int, devices: int) -> Step | None:
    return choose_step(MODELS[name], tokens, devices)


def plan_table() -> str:
    heads = ["model", "devices", "tokens", "layout", "recompute", "rows x passes", "state GB", "rest GB", "total GB"]
    rows = [[*heads, "shards GB", "copies GB", "tensor GB", "products s", "data s", "tensor s", "MFU"]]
    for name, model in MODELS.items():
        cases = [(devices, model.tokens) for devices in DEVICES]
        if name != "124M":
            cases.append((DEVICES[-1], LARGE_BATCH))
        for devices, tokens in cases:
            step = chosen_step(name, tokens, devices)
            rows.append([name, f"{devices:,}", *(step_cells(step) if step else cells_if_none_fits(model, devices))])
    return table(rows)


def step_cells(step: Step) -> list[str]:
    memory, (low, high) = step.memory, step.mfu
    state = memory.weights + memory.gradients + memory.optimizer
    return [
        millions(step.tokens),
        step.layout.name,
        "full" if step.workload.checkpointing else "none",
        f"{step.workload.sequences} x {step.micro_batches}",
        *(f"{value / GB:.1f}" for value in (state, memory.total - state, memory.total)),
        *(f"{value / GB:,.1f}" for value in vars(step.volume).values()),
        *(f"{value:.3f}" for value in (step.matmul_seconds, step.data_seconds, step.tensor_seconds)),
        f"{low:.0%} to {high:.0%}",
    ]


def cells_if_none_fits(model: Model, devices: int) -> list[str]:
    state = 4 * FP32 * model.parameters.local_elements(devices)
    return ["", "none fits", "", "", f"{state / GB:.1f}", *[""] * 9]


PUBLISHED = [
    # model, config, shards, tensor parallel size, device batch size, activation checkpointing, tokens/s per device
    ("8B", LLAMA_8B, 8, 1, 2, False, 6667.0),
    ("8B", LLAMA_8B, 128, 1, 2, False, 6514.0),
    ("8B", LLAMA_8B, 8, 8, 12, False, 4378.0),
    ("70B", LLAMA_70B, 32, 8, 16, True, 597.3),
]


def published_table() -> str:
    """torchtitan's measurements in bf16, and the MFU that these formulas predict for them."""
    rows = [["torchtitan's run", "tokens/s of a device", "MFU measured", "MFU by the formulas"]]
    for name, config, shards, tensor, batch, checkpointing, speed in PUBLISHED:
        model, workload = Model(config, 8192, 0), Workload(batch, 8192, checkpointing=checkpointing)
        layout = Layout("", shards * tensor, "", shards, shards, shards, tensor)
        low, high = predict_step(model, layout, workload, 1, megatron=True).mfu
        what = f"{name}, FSDP2 {shards}" + (f" x TP {tensor}" if tensor > 1 else "")
        rows.append(
            [what, f"{speed:,.0f}", f"{speed * model.flops.total / PEAK_FLOPS:.1%}", f"{low:.1%} to {high:.1%}"]
        )
    return table(rows)


NEAREST_PUBLISHED = [
    # model, devices, the nearest published run, its MFU
    ("1B", 512, "Megatron-LM, 2B, its smallest", "41%"),
    ("7B", 8, "torchtitan, 8B, FSDP2 8", "39.0%"),
    ("7B", 64, "torchtitan, 8B, FSDP2 128", "38.1%"),
    ("7B", 512, "torchtitan, 8B, FSDP2 128", "38.1%"),
    ("70B", 64, "torchtitan, 70B, FSDP2 32 x TP 8", "29.1%"),
    ("70B", 512, "torchtitan, 70B, FSDP2 32 x TP 8", "29.1%"),
    ("70B", 4096, "Megatron-LM, 175B, 4,608 devices", "42%"),
]


def comparison_table() -> str:
    """Predictions of the first table next to the most similar published measurement."""
    rows = [["model", "devices", "layout here", "MFU here, predicted", "nearest published run", "MFU measured"]]
    for name, devices, run, measured in NEAREST_PUBLISHED:
        step = chosen_step(name, MODELS[name].tokens, devices)
        assert step is not None
        low, high = step.mfu
        rows.append([name, f"{devices:,}", step.layout.name, f"{low:.0%} to {high:.0%}", run, measured])
    return table(rows)


if __name__ == "__main__":
    print(plan_table(), published_table(), comparison_table(), sep="\n\n")
