"""Tokens per second of pretraining on this machine: scratch-gpt, nanoGPT and `transformers.Trainer`.

    python benchmarks/pretraining.py --nanogpt ../nanoGPT            # all shapes, about an hour on two cores
    python benchmarks/pretraining.py --nanogpt ../nanoGPT --shape a --repeats 5
    python benchmarks/pretraining.py --profile --shape c             # profile of two steps of scratch-gpt

All train GPT-2's architecture of the same shape, without dropout, on the same random tokens, with the same number of
tokens per step. Each contestant runs in its own process, in turn, and reports the median of its steps; the table has the
median over the turns. The first turn tries every setting; the others repeat the fastest one of each contestant, and the
default. nanoGPT runs its own model, optimizer and training step (from a checkout of the public repository); Trainer
trains `GPT2LMHeadModel`. Each is tried in float32 and in bfloat16 autocast (which nanoGPT's script would not enable on a
CPU), eager and compiled, and scratch-gpt is compared with its best; "default" is float32 and eager, as their
documentation recommends for a CPU. bfloat16 is skipped where it is emulated.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

SHAPES = {
    # name: layers, width, heads, vocabulary, context, sequences per step
    "a": (6, 320, 5, 4096, 256, 16),
    "b": (8, 320, 5, 50304, 512, 8),
    "c": (12, 768, 12, 50304, 1024, 4),
}
STEPS, WARM_UP = 5, 2
RATE = 3e-4


def tokens(vocabulary: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, count).astype(np.uint16)


def timed_steps(step: Callable[[], object]) -> list[float]:
    seconds = []
    for number in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds


def nanogpt(shape: tuple[int, ...], precision: str, compiled: bool, checkout: str) -> list[float]:
    """nanoGPT's training step, as its train.py has it."""
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig

    layers, width, heads, vocabulary, context, sequences = shape
    config = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "block_size": context}
    model = GPT(GPTConfig(**config, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, RATE, (0.9, 0.95), "cpu")
    run = torch.compile(model) if compiled else model
    data = tokens(vocabulary, 1_000_000)

    def step() -> None:
        starts = torch.randint(len(data) - context, (sequences,))
        x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            _, loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed_steps(step)


def trainer(shape: tuple[int, ...], precision: str, compiled: bool, checkout: str) -> list[float]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    layers, width, heads, vocabulary, context, sequences = shape
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, **no_dropout
    )
    data = tokens(vocabulary, (WARM_UP + STEPS) * sequences * context).reshape(-1, context).astype(np.int64)
    dataset = [{"input_ids": row, "labels": row} for row in data]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=WARM_UP + STEPS,
            per_device_train_batch_size=sequences,
            bf16=precision == "bf16",
            torch_compile=compiled,
            learning_rate=RATE,
            weight_decay=0.1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(GPT2LMHeadModel(config), arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    ends = marks[1::2]  # from the end of one step to the end of the next, loading included
    return [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]


def ours(
    shape: tuple[int, ...],
    precision: str,
    compiled: bool,
    checkout: str = "",
    *,
    all_logits: bool = False,
    keep_memory: bool = True,
    **training_settings: object,
) -> list[float]:
    """The training loop of `scratch-gpt pretrain`, with guard and metrics."""
    from scratch_gpt.compute.activation_checkpointing import enable_activation_checkpointing
    from scratch_gpt.compute.compile import compile_blocks
    from scratch_gpt.compute.malloc import keep_freed_memory
    from scratch_gpt.config import PhaseSettings, PretrainSettings, TrainingSettings
    from scratch_gpt.data.loader import TrainingData
    from scratch_gpt.data.mixture import DataOrder, DataPosition
    from scratch_gpt.data.packing import pack
    from scratch_gpt.data.shards import TokenStream
    from scratch_gpt.distributed.optimizer import build_optimizer
    from scratch_gpt.distributed.setup import build_strategy
    from scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
    from scratch_gpt.model.presets import GPT2_STYLE
    from scratch_gpt.training.checkpoint import TrainingState
    from scratch_gpt.training.metrics import read_metrics
    from scratch_gpt.training.trainer import BatchSizes, RunData, Trainer, TrainerCallback, TrainUnit

    if keep_memory:
        keep_freed_memory()
    layers, width, heads, vocabulary, context, sequences = shape
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "vocab_size": vocabulary}
    fields = {**GPT2_STYLE, **sizes, "max_position_embeddings": context, "bos_token_id": None, "eos_token_id": None}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**fields)).train()
    if all_logits:
        model.forward = functools.partial(model.forward, skip_logits=False)  # type: ignore[method-assign]
    if compiled:
        compile_blocks(model)
    stream = TokenStream([tokens(vocabulary, 1_000_000)], num_bytes=1_000_000)
    steps = WARM_UP + STEPS
    rare = {"eval_every": 10**9, "save_every": 10**9}
    training = TrainingSettings(learning_rate=RATE, trackers=[], **rare, **training_settings)  # type: ignore[arg-type]
    enable_activation_checkpointing(model, training)
    packing = pack(stream, "concat", context, False, 0, "random")
    data = TrainingData(
        {"random": stream}, DataOrder({"random": packing}, [PhaseSettings("pretrain")]), context, False, vocabulary
    )
    strategy = build_strategy()
    unit = TrainUnit(strategy, strategy.parallelize(model, precision), build_optimizer(model, training), tokenizer=None)
    run_data = RunData(data, validation={}, batch_sizes=BatchSizes(sequences, sequences, 1))
    state = TrainingState(0, 0, "", DataPosition(), precision, compiled)

    class Finished(Exception):
        pass

    class FinishEarly(TrainerCallback):
        """Ends the run one step before its last, which would validate and save."""

        def on_step_end(self, trainer: Trainer, record: dict) -> None:
            if record["step"] == steps:
                raise Finished

    with tempfile.TemporaryDirectory() as folder:
        settings = PretrainSettings(run_dir=folder, max_steps=steps + 1, training=training)
        with contextlib.suppress(Finished):
            Trainer(settings, Path(folder), unit, run_data, state, callbacks=[FinishEarly()]).run()
        records = read_metrics(Path(folder) / "metrics.jsonl")
    return [sequences * context / record["tokens_per_second"] for record in records[WARM_UP:]]


CONTESTANTS = {"nanoGPT": nanogpt, "Trainer": trainer, "scratch-gpt": ours}


def child(arguments: argparse.Namespace) -> None:
    import resource

    global STEPS
    STEPS = arguments.steps
    torch.manual_seed(0)
    run = CONTESTANTS[arguments.child]
    seconds = run(SHAPES[arguments.shape], arguments.precision, arguments.compiled, arguments.nanogpt)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak}))


def matmul_peak(precision: str, size: int = 2048) -> float:
    """FLOP per second of a large matrix product on this machine, the best of ten."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def precisions() -> list[str]:
    """The precisions that this machine computes in without emulation."""
    from scratch_gpt.compute.precision import has_bf16

    return ["fp32", "bf16"] if has_bf16(torch.device("cpu")) else ["fp32"]


def flops_per_step(shape: tuple[int, ...]) -> float:
    """Forward and backward: per token, 6 for each weight of a matrix, and 12 * layers * width * context for attention."""
    layers, width, _, vocabulary, context, sequences = shape
    weights = 12 * layers * width**2 + vocabulary * width
    return sequences * context * (6 * weights + 12 * layers * width * context / 2)  # attention is causal: half


def compare(name: str, arguments: argparse.Namespace) -> None:
    shape = SHAPES[name]
    layers, width, _, vocabulary, context, sequences = shape
    print(
        f"\n({name}) {layers} layers of {width}, vocabulary {vocabulary}, context {context}, {sequences} sequences per step\n"
    )
    peaks = dict.fromkeys(precisions(), 0.0)
    settings = [(who, precision, compiled) for who in CONTESTANTS for precision in peaks for compiled in (0, 1)]
    if arguments.skip_compile:
        settings = [setting for setting in settings if not setting[2]]
    results: dict[tuple, list[dict[str, float]]] = {setting: [] for setting in settings}
    for turn in range(arguments.repeats):
        if turn == 1:
            fastest = {
                who: min((s for s in settings if s[0] == who), key=lambda s: results[s][0]["seconds"])
                for who in CONTESTANTS
            }
            settings = [s for s in settings if s in fastest.values() or s[1:] == ("fp32", 0)]
        for precision, highest in peaks.items():
            peaks[precision] = max(highest, matmul_peak(precision))
        for setting in settings:
            who, precision, compiled = setting
            command = [sys.executable, __file__, "--child", who, "--shape", name, "--precision", precision]
            command += ["--nanogpt", arguments.nanogpt, "--steps", str(arguments.steps)] + ["--compiled"] * compiled
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
            if done.returncode:
                raise SystemExit(f"{who} failed:\n{done.stderr[-2000:]}")
            results[setting].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}: {setting} {results[setting][-1]}", file=sys.stderr, flush=True)
    print("| | precision | | tokens/s | range | of the matmul peak | peak memory |\n|---|---|---|---:|---:|---:|---:|")
    speeds: dict[tuple, float] = {}
    for setting, found in results.items():
        who, precision, compiled = setting
        each = sorted(sequences * context / result["seconds"] for result in found)
        speeds[setting] = statistics.median(each)
        share = flops_per_step(shape) * speeds[setting] / (sequences * context) / peaks[precision]
        memory = statistics.median(result["peak"] for result in found) / 1e9
        print(
            f"| {who} | {precision} | {'compiled' if compiled else 'eager'} | {speeds[setting]:,.0f} | "
            f"{each[0]:,.0f} - {each[-1]:,.0f} | {share:.0%} | {memory:.2f} GB |"
        )
    best = {who: max((s for s in results if s[0] == who), key=lambda s: speeds[s]) for who in CONTESTANTS}
    memory = {who: statistics.median(result["peak"] for result in results[best[who]]) for who in CONTESTANTS}
    print(f"\nmatmul peak: {', '.join(f'{peak / 1e9:,.0f} GFLOP/s {precision}' for precision, peak in peaks.items())}")
    for who in ("nanoGPT", "Trainer"):
        ours = speeds[best["scratch-gpt"]]
        print(
            f"scratch-gpt is {ours / speeds[best[who]]:.2f}x the best of {who}, {ours / speeds[who, 'fp32', 0]:.2f}x its "
            f"default, with {memory['scratch-gpt'] / memory[who]:.2f} of its peak memory at its best",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", default="", help="checkout of the public repository")
    parser.add_argument("--shape", choices=[*SHAPES], help="one shape only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps per turn, after two to warm up")
    parser.add_argument("--profile", action="store_true", help="profile two steps of scratch-gpt instead of comparing")
    parser.add_argument("--skip-compile", action="store_true", help="eager settings only")
    parser.add_argument("--child", choices=[*CONTESTANTS], help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if not arguments.profile and not Path(arguments.nanogpt, "model.py").is_file():
        parser.error("--nanogpt DIR is needed: a checkout of github.com/karpathy/nanoGPT")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name in [arguments.shape] if arguments.shape else SHAPES:
        if arguments.profile:
            ours(SHAPES[name], precisions()[-1], True, profile_steps=[4, 5])
        else:
            compare(name, arguments)


if __name__ == "__main__":
    main()
