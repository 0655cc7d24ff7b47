"""Pretraining on 8 to 4,096 H100s, on paper: which layout, what a device holds and sends, what share of the peak remains.

    python benchmarks/scaling.py

prints the tables of docs/scaling.md, where the formulas are explained and their sources named. Memory and FLOPs are the
planner's; nothing here was run on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.flops import Flops, flops_per_token
from scratch_gpt.model.presets import preset
from scratch_gpt.planning import memory as footprint
from scratch_gpt.planning.memory import BF16, FP32, Parameters, Workload
from scratch_gpt.planning.plan import FILL, GB, Layout, Memory, memory

MEMORY, PEAK = 80e9, 989e12
"""Bytes and dense bf16 FLOP/s of an H100 SXM (data sheet)."""
NVLINK, NETWORK, NODE = 450e9, 50e9, 8
"""Bytes per second of a device in one direction: NVLink 4, and one 400 Gb/s port each; devices of a machine."""
DEVICES = (8, 64, 512, 4096)
NEAR = 0.99
"""A simpler layout is taken if it reaches this share of the fastest one's speed."""

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
    """Of a step, where the devices allow it."""

    @cached_property
    def parameters(self) -> Parameters:
        return footprint.count(self.config)

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
"""Tokens of a step that Llama 3 405B ended with."""


# ------------------------------------------------------------------------------------------------ what is sent


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step."""

    shards: float
    """Weights gathered and gradients added up within one copy of the model."""
    copies: float
    """Gradients added up over the copies."""
    tensor: float
    """Sums and logits of tensor parallelism."""


def sent(model: Model, layout: Layout, load: Workload, passes: int, joined: bool = False) -> Sent:
    shards, tensor = layout.weight_shards, layout.tensor_parallel
    copies = layout.replicas // shards
    outside = (model.parameters.embeddings + model.parameters.head) / tensor
    blocks = model.parameters.total / tensor - outside
    once = (2 * BF16 + FP32) * blocks + 2 * FP32 * outside
    return Sent(
        shards=passes * once * (shards - 1) / shards,
        copies=2 * FP32 * (blocks + outside) / shards * (copies - 1) / copies,
        tensor=passes * load.tokens * sent_per_token(model.config, tensor, load.checkpointing, joined),
    )


def sent_per_token(config: ScratchGPTConfig, tensor: int, checkpointing: bool, joined: bool) -> float:
    """Two sums of hidden states forward in each block, one more where it is recomputed (which ends before the second).

    Backward it is one for each projection that reads the residual stream, in float32; one each for embedding and head,
    and the logits are gathered. `joined`: as in Megatron-LM, two in 16 bits backward, and the recomputation's two.
    """
    if joined:
        sums = config.hidden_size * config.num_hidden_layers * BF16 * (6 if checkpointing else 4)
        return 2 * sums * (tensor - 1) / tensor
    forward, backward = BF16 * (3 if checkpointing else 2), FP32 * (5 if config.mlp_type == "gated" else 4)
    sums = config.hidden_size * (config.num_hidden_layers * (forward + backward) + 2 * FP32)
    return (2 * sums + config.padded_vocab_size * BF16) * (tensor - 1) / tensor


def bandwidth(stride: int, members: int) -> float:
    """Of a device in a group of ``members`` that lie ``stride`` apart.

    A ring crosses to the next machine once for all members of a machine, whose network ports work side by side.
    """
    if stride * members <= NODE:
        return NVLINK
    return min(NVLINK, NETWORK * max(1, NODE // stride))


# ------------------------------------------------------------------------------------------------ how long it takes


@dataclass(frozen=True)
class Step:
    layout: Layout
    load: Workload
    passes: int
    """Forward and backward passes of a step, one after the other."""
    memory: Memory
    flops: float
    """Of a device, that the model needs."""
    seconds: float
    """Of matrix products, at the speed that was measured where hardly anything waits."""
    volume: Sent
    in_data: float
    """Seconds of communication that may run while matrices are multiplied."""
    in_tensor: float
    """Seconds of communication that the next product waits for."""

    @property
    def tokens(self) -> int:
        return self.load.tokens * self.passes * self.layout.replicas

    @property
    def mfu(self) -> tuple[float, float]:
        """If no communication is hidden behind matrix products, and if all is that can be."""
        bare = self.seconds + self.in_tensor
        return self.flops / PEAK / (bare + self.in_data), self.flops / PEAK / max(bare, self.in_data)


def efficiency() -> float:
    """Share of the peak of torchtitan's Llama 3.1 8B on one machine: 6,667 tokens/s on each of 8 H100s."""
    return 6667 * flops_per_token(LLAMA_8B, 8192).total / PEAK


def step(model: Model, layout: Layout, load: Workload, passes: int, joined: bool = False) -> Step:
    each = load.tokens * passes / layout.tensor_parallel
    computed = model.flops.total + (model.flops.recomputed if load.checkpointing else 0)
    volume = sent(model, layout, load, passes, joined)
    shards, tensor = layout.weight_shards, layout.tensor_parallel
    in_copies = volume.copies / bandwidth(tensor * shards, layout.replicas // shards)
    return Step(
        layout,
        load,
        passes,
        memory(model.config, model.parameters, layout, load),
        each * model.flops.total,
        each * computed / (efficiency() * PEAK),
        volume,
        volume.shards / bandwidth(tensor, shards) + in_copies,
        volume.tensor / bandwidth(1, tensor),
    )


# ------------------------------------------------------------------------------------------------ the choice


def layouts(devices: int) -> Iterator[Layout]:
    """Those that `pretrain` has, from simple to elaborate."""
    yield Layout("DDP", devices, "")
    for tensor in (1, NODE):
        groups = devices // tensor
        suffix = f" x TP {tensor}" if tensor > 1 else ""
        if tensor > 1 and groups == 1:
            yield Layout(f"TP {tensor}", devices, "", tensor_parallel=tensor)
        for shards in (groups, *(2**power for power in range(1, 13) if 2**power < groups)):
            if shards * tensor < NODE or shards == 1:
                continue
            name = f"FSDP2 {shards}" if shards == groups else f"HSDP {groups // shards} x {shards}"
            yield Layout(name + suffix, devices, "", shards, shards, shards, tensor)


def best(model: Model, tokens: int, devices: int) -> Step | None:
    """Of all that fit: the least tokens above the wish, then the fastest if nothing is hidden, then the simplest."""
    found = []
    for layout in layouts(devices):
        if model.config.num_key_value_heads % layout.tensor_parallel:
            continue
        rows = max(1, tokens // (model.context * layout.replicas))
        for checkpointing in (False, True):
            load = Workload(1, model.context, checkpointing=checkpointing)
            fitting = [each for each in range(1, rows + 1) if rows % each == 0 and fits(model, layout, load, each)]
            if fitting:
                found.append(step(model, layout, replace(load, rows=fitting[-1]), rows // fitting[-1]))
    if not found:
        return None
    least = min(one.tokens for one in found)
    found = [one for one in found if one.tokens == least]
    fastest = max(one.mfu[0] for one in found)
    return next(one for one in found if one.mfu[0] >= NEAR * fastest)


def fits(model: Model, layout: Layout, load: Workload, rows: int) -> bool:
    return memory(model.config, model.parameters, layout, replace(load, rows=rows)).total <= FILL * MEMORY


# ------------------------------------------------------------------------------------------------ in words


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def millions(tokens: int) -> str:
    return f"{tokens / 2**20:g} Mi"


@cache
def best_of(name: str, tokens: int, devices: int) -> Step | None:
    return best(MODELS[name], tokens, devices)


def plan_table() -> str:
    heads = ["model", "devices", "tokens", "layout", "recompute", "rows x passes", "state GB", "rest GB", "total GB"]
    rows = [[*heads, "shards GB", "copies GB", "tensor GB", "products s", "data s", "tensor s", "MFU"]]
    for name, model in MODELS.items():
        wishes = [(devices, model.tokens) for devices in DEVICES]
        for devices, tokens in [*wishes, *([] if name == "124M" else [(DEVICES[-1], LARGE_BATCH)])]:
            chosen = best_of(name, tokens, devices)
            rows.append([name, f"{devices:,}", *(in_words(chosen) if chosen else refusal(model, devices))])
    return table(rows)


def in_words(chosen: Step) -> list[str]:
    held, (low, high) = chosen.memory, chosen.mfu
    state = held.weights + held.gradients + held.optimizer
    return [
        millions(chosen.tokens),
        chosen.layout.name,
        "full" if chosen.load.checkpointing else "none",
        f"{chosen.load.rows} x {chosen.passes}",
        *(f"{value / GB:.1f}" for value in (state, held.total - state, held.total)),
        *(f"{value / GB:,.1f}" for value in vars(chosen.volume).values()),
        *(f"{value:.3f}" for value in (chosen.seconds, chosen.in_data, chosen.in_tensor)),
        f"{low:.0%} to {high:.0%}",
    ]


def refusal(model: Model, devices: int) -> list[str]:
    state = 4 * FP32 * model.parameters.held(devices)
    return ["", "none fits", "", "", f"{state / GB:.1f}", *[""] * 9]


PUBLISHED = [
    # model, shards, tensor parallel, rows, full recomputation, tokens per second of each device
    ("8B", LLAMA_8B, 8, 1, 2, False, 6667.0),
    ("8B", LLAMA_8B, 128, 1, 2, False, 6514.0),
    ("8B", LLAMA_8B, 8, 8, 12, False, 4378.0),
    ("70B", LLAMA_70B, 32, 8, 16, True, 597.3),
]


def published_table() -> str:
    """torchtitan's measurements in bf16 beside what these formulas say of them."""
    rows = [["torchtitan's run", "tokens/s of a device", "MFU measured", "MFU by the formulas"]]
    for name, config, shards, tensor, batch, checkpointing, speed in PUBLISHED:
        model, load = Model(config, 8192, 0), Workload(batch, 8192, checkpointing=checkpointing)
        layout = Layout("", shards * tensor, "", shards, shards, shards, tensor)
        low, high = step(model, layout, load, 1, joined=True).mfu
        what = f"{name}, FSDP2 {shards}" + (f" x TP {tensor}" if tensor > 1 else "")
        rows.append([what, f"{speed:,.0f}", f"{speed * model.flops.total / PEAK:.1%}", f"{low:.1%} to {high:.1%}"])
    return table(rows)


BESIDE = [
    # model, devices, the nearest published run, its MFU
    ("1B", 512, "Megatron-LM, 2B, its smallest", "41%"),
    ("7B", 8, "torchtitan, 8B, FSDP2 8", "39.0%"),
    ("7B", 64, "torchtitan, 8B, FSDP2 128", "38.1%"),
    ("7B", 512, "torchtitan, 8B, FSDP2 128", "38.1%"),
    ("70B", 64, "torchtitan, 70B, FSDP2 32 x TP 8", "29.1%"),
    ("70B", 512, "torchtitan, 70B, FSDP2 32 x TP 8", "29.1%"),
    ("70B", 4096, "Megatron-LM, 175B, 4,608 devices", "42%"),
]


def beside_table() -> str:
    """Rows of the first table, and what others have measured nearest to them."""
    rows = [["model", "devices", "layout here", "MFU here, predicted", "nearest published run", "MFU measured"]]
    for name, devices, run, measured in BESIDE:
        chosen = best_of(name, MODELS[name].tokens, devices)
        assert chosen is not None
        low, high = chosen.mfu
        rows.append([name, f"{devices:,}", chosen.layout.name, f"{low:.0%} to {high:.0%}", run, measured])
    return table(rows)


if __name__ == "__main__":
    print(plan_table(), published_table(), beside_table(), sep="\n\n")
