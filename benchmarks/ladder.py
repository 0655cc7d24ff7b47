"""Effect of each setting of `scratch-gpt pretrain` on speed and memory on this machine, one at a time.

    python benchmarks/ladder.py               # 30M parameters, vocabulary 50,304, context 512; about 15 minutes on two cores
    python benchmarks/ladder.py --shape a --repeats 5

Each of the first rungs adds a setting to the one above; the last ones add a setting to the fastest that costs time and
saves memory or steps. Every rung runs in its own process, all rungs in turn, `--repeats` times. The table has the median
tokens per second of the training loop, and the peak memory of the process beyond that of its imports.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch
from pretraining import SHAPES, ours

PLAIN = {"precision": "fp32", "compiled": False, "all_logits": True, "keep_memory": False}
CHUNKED = {**PLAIN, "all_logits": False}
BF16 = {**CHUNKED, "precision": "bf16"}
KEPT = {**BF16, "keep_memory": True}
COMPILED = {**KEPT, "compiled": True}
RUNGS = {
    "float32, eager, logits of the full batch": PLAIN,
    "+ the loss in chunks": CHUNKED,
    "+ bf16 (`--training.precision bf16`)": BF16,
    "+ freed memory kept": KEPT,
    "+ compiled blocks (`--training.compile on`)": COMPILED,
    "with `--training.activation_checkpointing selective`": {**COMPILED, "activation_checkpointing": "selective"},
    "with `--training.activation_checkpointing full`": {**COMPILED, "activation_checkpointing": "full"},
    "with `--training.optimizer muon`": {**COMPILED, "optimizer": "muon"},
}


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(arguments: argparse.Namespace) -> None:
    import scratch_gpt.training.pretrain  # noqa: F401  (so that its memory is not counted)

    before = peak_memory()
    torch.manual_seed(0)
    seconds = ours(SHAPES[arguments.shape], **RUNGS[arguments.child])  # type: ignore[arg-type]
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak_memory() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="b", help="a shape of benchmarks/pretraining.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in RUNGS}
    for _ in range(arguments.repeats):
        for name in RUNGS:
            command = [sys.executable, __file__, "--shape", arguments.shape, "--child", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    layers, width, _, vocabulary, context, sequences = SHAPES[arguments.shape]
    print(f"{layers} layers of {width}, vocabulary {vocabulary:,}, context {context}, {sequences} sequences per step\n")
    print("| | tokens/s | range | times the first | peak memory |\n|---|---:|---:|---:|---:|")
    first = None
    for name, found in results.items():
        each = sorted(sequences * context / result["seconds"] for result in found)
        speed = statistics.median(each)
        first = first or speed
        memory = statistics.median(result["peak"] for result in found) / 1e9
        print(
            f"| {name} | {speed:,.0f} | {each[0]:,.0f} - {each[-1]:,.0f} | {speed / first:.2f} | {memory:.2f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
