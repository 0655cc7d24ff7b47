"""Time to a loss: what nanoGPT's recipe reaches in 20 minutes on this machine, and scratch-gpt in a third of that time.

    python benchmarks/time_to_loss.py --train stories_train.txt --valid stories_valid.txt --nanogpt ../nanoGPT

Both train on the same tokens, with a BPE vocabulary of 4,096 that is made before and not timed, and are scored on the
same held-out text: every byte once, in consecutive windows of their context length, in bits per byte. The clock starts
with the process: imports, compiling and whatever the contestant measures before training count.

nanoGPT runs its own model (10M parameters, context 256, GPT-2's block), optimizer and training step, compiled and with
bfloat16 autocast where the machine supports it, which is faster than its script on a CPU, and without the script's
evaluations. Its learning rate decays as a cosine over its time; --tune tries several peaks for a quarter of the time each
and uses the best.
scratch-gpt runs `scratch-gpt pretrain` with its defaults, for as many steps as fit into its time at the speed of a first
run of a minute, which is not timed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pretraining import precisions

LAYERS, WIDTH, HEADS, CONTEXT, BATCH_SIZE = 6, 320, 5, 256, 16
RATES = (1e-3, 2e-3, 4e-3)
"""Peak learning rates that --tune tries first; nanoGPT's script has 6e-4 for 124M parameters and 1e-3 for small models."""
CONTESTANTS = ["nanoGPT", "scratch-gpt"]
PILOT_SECONDS = 60.0
RESERVE = 0.98
"""Fraction of the time for steps that is planned for."""


def settings_of(arguments: argparse.Namespace, run_dir: Path):
    """Settings of `scratch-gpt pretrain`: the defaults, apart from paths and intervals."""
    from scratch_gpt.config import PretrainSettings, TokenizerSettings, TrainingSettings

    return PretrainSettings(
        corpus=str(arguments.train),
        validation_corpus=str(arguments.valid),
        run_dir=str(run_dir),
        seed=arguments.seed,
        tokenizer_path=str(arguments.work / "tokenizer") if run_dir.name != "prepared" else None,
        data_path=str(arguments.work / "data") if run_dir.name != "prepared" else None,
        tokenizer=TokenizerSettings(vocab_size=4096),
        training=TrainingSettings(eval_every=10**9, save_every=10**9, trackers=[]),
    )


def prepare(arguments: argparse.Namespace) -> None:
    from scratch_gpt.training.pretrain import prepare_data, prepare_tokenizer

    run_dir = arguments.work / "prepared"
    run_dir.mkdir()
    prepare_tokenizer(settings_of(arguments, run_dir), run_dir)
    prepare_data(settings_of(arguments, run_dir), run_dir)
    for name in ("tokenizer", "data"):
        (run_dir / name).rename(arguments.work / name)


def stream(work: Path, split: str):
    from scratch_gpt.data.shards import TokenStream, read_manifest

    manifest = read_manifest(work / "data")
    return TokenStream.open(work / "data", split, manifest, next(iter(manifest["sources"])))


def seconds_since_process_start() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()


def train_nanogpt(arguments: argparse.Namespace) -> dict[str, float]:
    sys.path.insert(0, str(arguments.nanogpt))
    from model import GPT, GPTConfig

    torch.manual_seed(arguments.seed)
    model = GPT(GPTConfig(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=4096, block_size=CONTEXT, dropout=0.0))
    optimizer = model.configure_optimizers(0.1, arguments.rate, (0.9, 0.95), "cpu")
    compiled = torch.compile(model)
    train = stream(arguments.work, "train")
    tokens = np.asarray(train.read(0, len(train))).astype(np.int64)
    generator = torch.Generator().manual_seed(arguments.seed)
    warm_up, steps = 100, 0
    while (spent := seconds_since_process_start()) < arguments.seconds:
        decayed = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * spent / arguments.seconds))
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min((steps + 1) / warm_up, decayed)
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH_SIZE,), generator=generator).tolist()
        x = torch.stack([torch.from_numpy(tokens[i : i + CONTEXT]) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + CONTEXT]) for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            _, loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
    seconds = seconds_since_process_start()
    model.eval()
    bits = score(lambda x, y: model(x, y)[0], arguments.work, CONTEXT)
    return {"bits_per_byte": bits, "seconds": seconds, "steps": steps, "tokens": steps * BATCH_SIZE * CONTEXT}


def train_ours(arguments: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from scratch_gpt.training.build import build
    from scratch_gpt.training.metrics import read_metrics
    from scratch_gpt.training.pretrain import train

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        settings = settings_of(arguments, run_dir)
        run = build(settings, run_dir, budget_seconds=arguments.seconds - seconds_since_process_start())
        settings.max_steps = arguments.steps or run.steps_in(PILOT_SECONDS)
        train(run)
        seconds = seconds_since_process_start()
        records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
        last = records[-1]
        stepping = last["time"] - records[0]["time"]
        model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32).eval()
        context = model.config.max_position_embeddings
        bits = score(lambda x, y: model(input_ids=x, use_cache=False).logits, arguments.work, context)
    return {
        "bits_per_byte": bits,
        "seconds": seconds,
        "steps": last["step"],
        "tokens": last["tokens"],
        "steps_per_second": (len(records) - 1) / stepping,
        "other_seconds": seconds - stepping,
    }


@torch.no_grad()
def score(logits_of, work: Path, context: int) -> float:
    """Bits per byte of the held-out text."""
    from scratch_gpt.data.shards import read_manifest, totals

    held_out = stream(work, "validation")
    ids = torch.from_numpy(np.asarray(held_out.read(0, len(held_out))).astype(np.int64))
    nats = 0.0
    for first in range(0, len(ids) - 1, context):
        window = ids[first : first + context + 1]
        logits = logits_of(window[None, :-1], window[None, 1:])
        nats += torch.nn.functional.cross_entropy(logits[0].float(), window[1:], reduction="sum").item()
    return nats / math.log(2) / totals(read_manifest(work / "data"), "validation")["bytes"]


def run(
    arguments: argparse.Namespace, work: Path, who: str, minutes: float, seed: int, rate: float = 0.0, steps: int = 0
) -> dict:
    command = [sys.executable, __file__, "--child", who, "--work", str(work), "--seed", str(seed)]
    command += ["--train", str(arguments.train), "--valid", str(arguments.valid), "--nanogpt", str(arguments.nanogpt)]
    command += ["--seconds", str(60 * minutes), "--rate", str(rate), "--steps", str(steps)]
    command += ["--bf16"] * arguments.bf16
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if who == "nanoGPT":
        remark = f", learning rate {rate:g}"
    else:
        remark = "" if steps else ", the first run"
    print(
        f"{who:<11} seed {seed}  {result['seconds'] / 60:5.2f} min  {result['bits_per_byte']:.4f} bits per byte  "
        f"{result['steps']:>7,} steps, {result['tokens'] / 1e6:.2f}M tokens{remark}",
        flush=True,
    )
    return result


def steps_that_fit(arguments: argparse.Namespace, work: Path) -> int:
    first = run(arguments, work, "scratch-gpt", arguments.our_minutes, 0)
    return int(RESERVE * (60 * arguments.our_minutes - first["other_seconds"]) * first["steps_per_second"])


def tuned(arguments: argparse.Namespace, work: Path) -> float:
    """The best of several peak learning rates; extends the range until the best is not at either end."""
    bits = {rate: run(arguments, work, "nanoGPT", arguments.minutes / 4, 0, rate)["bits_per_byte"] for rate in RATES}
    while (best := min(bits, key=bits.__getitem__)) in (min(bits), max(bits)):
        rate = best / 2 if best == min(bits) else best * 2
        bits[rate] = run(arguments, work, "nanoGPT", arguments.minutes / 4, 0, rate)["bits_per_byte"]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to score on")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--minutes", type=float, default=20.0, help="time of nanoGPT")
    parser.add_argument("--our-minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs=1, default=CONTESTANTS, choices=CONTESTANTS, help="run only one of the two")
    parser.add_argument("--rate", type=float, default=2e-3, help="nanoGPT's peak learning rate")
    parser.add_argument("--tune", action="store_true", help="find nanoGPT's learning rate first")
    parser.add_argument("--child", choices=["prepare", *CONTESTANTS], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        does = {"prepare": prepare, "nanoGPT": train_nanogpt, "scratch-gpt": train_ours}
        print(json.dumps(does[arguments.child](arguments)))
        return
    for file in (arguments.train, arguments.valid, arguments.nanogpt / "model.py"):
        if not file.is_file():
            parser.error(f"there is no file {file}")
    arguments.bf16 = "bf16" in precisions()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, nanoGPT in {'bf16' if arguments.bf16 else 'fp32'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", "prepare", "--work", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results: dict[str, list[dict]] = {who: [] for who in arguments.only}
        rate = tuned(arguments, work) if arguments.tune and "nanoGPT" in results else arguments.rate
        steps = steps_that_fit(arguments, work) if "scratch-gpt" in results else 0
        for seed in arguments.seeds:
            if "nanoGPT" in results:
                results["nanoGPT"].append(run(arguments, work, "nanoGPT", arguments.minutes, seed, rate))
            if "scratch-gpt" in results:
                results["scratch-gpt"].append(
                    run(arguments, work, "scratch-gpt", arguments.our_minutes, seed, steps=steps)
                )
    print("\n| median | minutes | bits per byte | range |\n|---|---:|---:|---|")
    for who, each in results.items():
        bits = [result["bits_per_byte"] for result in each]
        minutes = statistics.median(result["seconds"] for result in each) / 60
        print(f"| {who} | {minutes:.1f} | {statistics.median(bits):.3f} | {min(bits):.3f} - {max(bits):.3f} |")


if __name__ == "__main__":
    main()
