"""ScratchGPT compared with transformers' own classes: the same weights through the converter, the same dtype and attention.

    python benchmarks/model.py                      # everything, about 25 minutes on two cores
    python benchmarks/model.py memory               # peak memory of a training step over a vocabulary of 50,257
    python benchmarks/model.py speed --dtype bfloat16 --compile

Speeds are wall time; the contestants take turns, and what counts is the ratio of their medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import CompileConfig

from scratch_gpt.convert.families import from_hf

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2() -> PreTrainedModel:
    """GPT-2 small, 124 M parameters."""
    return GPT2LMHeadModel(GPT2Config(**NO_DROPOUT))


def qwen3() -> PreTrainedModel:
    """The shape of SmolLM2-135M with QK-norm."""
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape |= {"intermediate_size": 1536, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192}
    return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))


STOCK = {"GPT2LMHeadModel": gpt2, "Qwen3ForCausalLM": qwen3}


def build(name: str, ours: bool, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = STOCK[name]().to(dtype)
    return from_hf(model) if ours else model


def train_step(model: PreTrainedModel, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


# ------------------------------------------------------------------------------------------------------------- memory


def peak_memory(name: str, ours: bool, dtype: torch.dtype, batch: int, context: int) -> dict[str, float]:
    """Peak resident memory (bytes) of this process beyond what the imports took, and seconds of a second step."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = build(name, ours, dtype).train()
    ids = torch.randint(50257, (batch, context), generator=torch.Generator().manual_seed(0))
    loss = train_step(model, ids)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    train_step(model, ids)
    return {"peak": peak - baseline, "seconds": time.perf_counter() - start, "loss": loss}


def memory(arguments: argparse.Namespace) -> None:
    batch, context = 8, arguments.context or 1024
    print(f"\nForward and backward, GPT-2 124M, vocabulary 50,257, {batch} x {context} tokens, {arguments.dtype}")
    print(f"(a process each, {arguments.repeats} times in turn)\n")
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(arguments.repeats):
        for ours in (False, True):
            command = [sys.executable, __file__, "child", "--dtype", arguments.dtype, "--context", str(context)]
            done = subprocess.run(command + ["--ours"] * ours, capture_output=True, text=True, check=True)
            results[ours].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        ours: {key: statistics.median(row[key] for row in found) for key in found[0]} for ours, found in results.items()
    }
    assert abs(rows[True]["loss"] - rows[False]["loss"]) < 1e-2, "the two models are not the same"
    print("| | peak memory | seconds |\n|---|---:|---:|")
    for ours, label in ((False, "GPT2LMHeadModel"), (True, "ScratchGPTForCausalLM")):
        print(f"| {label} | {rows[ours]['peak'] / 1e9:.2f} GB | {rows[ours]['seconds']:.1f} |")
    print(
        f"| ratio | {rows[True]['peak'] / rows[False]['peak']:.2f} | {rows[True]['seconds'] / rows[False]['seconds']:.2f} |"
    )


# -------------------------------------------------------------------------------------------------------------- speed


def take_turns(contestants: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each contestant, in turns, after one round of warming up."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(repeats + 1):
        for contestant, found in zip(contestants, seconds, strict=True):
            start = time.perf_counter()
            contestant()
            if turn:
                found.append(time.perf_counter() - start)
    return seconds


def report(label: str, tokens: int, seconds: list[list[float]]) -> None:
    stock, ours = (statistics.median(found) for found in seconds)
    pairs = sorted(a / b for a, b in zip(*seconds, strict=True))
    print(
        f"| {label} | {tokens / stock:,.0f} | {tokens / ours:,.0f} | {stock / ours:.2f} | {pairs[0]:.2f} - {pairs[-1]:.2f} |",
        flush=True,
    )


def speed(arguments: argparse.Namespace) -> None:
    dtype = getattr(torch, arguments.dtype)
    how = "compiled" if arguments.compile else "eager"
    print(f"\nTokens a second, {arguments.dtype}, {how}, {arguments.repeats} turns each\n")
    print("| | stock | ours | ours / stock | range |\n|---|---:|---:|---:|---:|")
    for name in STOCK:
        torch._dynamo.reset()  # or the graphs of the model before would count against this one
        models = [build(name, ours, dtype) for ours in (False, True)]
        for batch, context in ((8, 128), (1, 1024)):
            ids = torch.randint(49152, (batch, context), generator=torch.Generator().manual_seed(0))
            steps = []
            for model in models:
                model.train()
                forward = torch.compile(model) if arguments.compile else model
                steps.append(lambda forward=forward, ids=ids: train_step(forward, ids))
            label = f"{name}, forward and backward, {batch} x {context}"
            report(label, batch * context, take_turns(steps, arguments.repeats))
        prompt = torch.randint(49152, (1, 32), generator=torch.Generator().manual_seed(0))
        for new_tokens in (64, 256):
            report(
                f"{name}, greedy decoding, {new_tokens} tokens",
                new_tokens,
                take_turns(
                    [decoder(m.eval(), prompt, new_tokens, arguments.compile) for m in models], arguments.repeats
                ),
            )


def decoder(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, compiled: bool) -> Callable[[], object]:
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    if compiled:
        config = CompileConfig(fullgraph=True, mode="default")
        config._compile_all_devices = True  # on CPU as well
        arguments |= {"cache_implementation": "static", "compile_config": config}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "memory", "speed", "child"], default="all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--context", type=int, default=None, help="tokens per row of the memory test (1024)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "child":
        dtype = getattr(torch, arguments.dtype)
        print(json.dumps(peak_memory("GPT2LMHeadModel", arguments.ours, dtype, 8, arguments.context)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if arguments.what in ("all", "memory"):
        memory(arguments)
    if arguments.what == "speed":
        speed(arguments)
    if arguments.what == "all":
        for arguments.compile in (False, True):
            speed(arguments)


if __name__ == "__main__":
    main()
