"""Tiny Shakespeare on a CPU: scratch-gpt and nanoGPT side by side, by wall time.

nanoGPT's published recipe for a laptop (its README, "I only have a macbook"): characters, context 64, batch 12, 4 layers,
4 heads, width 128, 2,000 iterations, no dropout; about 3 minutes, loss 1.88 nats per character = 2.71 bits per byte.
The peer is run here, in the same call and on the same machine, from a checkout of github.com/karpathy/nanoGPT:

    python benchmarks/tiny_shakespeare.py --text tinyshakespeare.txt --nanogpt ../nanoGPT

Both train on the first 90 % of the text and are scored on the same last 10 %, every byte once, in bits per byte, which
compares characters with BPE tokens. Wall time counts everything from raw text on: for scratch-gpt the tokenizer, the
shards and the choice of the precision, for nanoGPT its preparation and training; process start included, final
scoring excluded. The runs alternate: nanoGPT, scratch-gpt in a third of its time, scratch-gpt in its time.
"""

import argparse
import contextlib
import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

NANOGPT_RECIPE = [
    *("--device=cpu", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]
SAVING_SECONDS = 2.0
"""Final validation and saving of a scratch-gpt run."""


def split(text: str) -> tuple[str, str]:
    """nanoGPT's own split: the first 90 % of the characters, and the rest."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def run_nanogpt(checkout: Path, text: Path, work: Path, compiled: bool) -> dict[str, float]:
    """Prepare and train with nanoGPT's own scripts; score the checkpoint they leave."""
    repository = work / "nanoGPT"
    shutil.copytree(checkout, repository, ignore=shutil.ignore_patterns(".git", "out*"))
    data = repository / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    start = time.perf_counter()
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    train = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_RECIPE, f"--compile={compiled}"]
    subprocess.run(train, cwd=repository, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bits_per_byte": score_nanogpt(repository, text)}


@torch.no_grad()
def score_nanogpt(repository: Path, text: Path) -> float:
    """Bits per byte of the held-out text, in windows of the model's context that meet end to end."""
    sys.path.insert(0, str(repository))
    from model import GPT, GPTConfig  # nanoGPT's model.py

    # nanoGPT's checkpoint is a pickle that the call above wrote itself
    checkpoint = torch.load(repository / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    with contextlib.redirect_stdout(None):
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in checkpoint["model"].items()})
    model.eval()
    meta = pickle.loads((repository / "data" / "shakespeare_char" / "meta.pkl").read_bytes())
    train, held_out = split(text.read_text(encoding="utf-8"))
    ids = torch.tensor([meta["stoi"][character] for character in train[-1] + held_out])
    block, nats = checkpoint["model_args"]["block_size"], 0.0
    for first in range(0, len(ids) - 1, block):
        window = ids[first : first + block + 1]
        logits, _ = model(window[None, :-1], window[None, 1:])
        nats += torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="sum").item()
    sys.path.remove(str(repository))
    return nats / math.log(2) / len(held_out.encode("utf-8"))


def run_ours(text: Path, work: Path, seconds: float, seed: int) -> dict[str, float]:
    """scratch-gpt in a process of its own, for ``seconds`` from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--text", str(text), "--train-for", str(seconds), "--work", str(work)]
    subprocess.run([*command, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - start
    last = json.loads((work / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {"seconds": elapsed, "bits_per_byte": last["validation_bits_per_byte"]}


def train_ours(text: Path, work: Path, seconds: float, seed: int) -> None:
    """Do what `scratch-gpt pretrain` does, with as many steps as fit into the time."""
    from scratch_gpt.config import PretrainSettings, TokenizerSettings, TrainingSettings
    from scratch_gpt.training.build import build
    from scratch_gpt.training.pretrain import prepare_data, prepare_tokenizer, train

    for name, part in zip(("train.txt", "held_out.txt"), split(text.read_text(encoding="utf-8")), strict=True):
        (work / name).write_text(part, encoding="utf-8")
    settings = PretrainSettings(
        corpus=str(work / "train.txt"),
        validation_corpus=str(work / "held_out.txt"),
        run_dir=str(work / "run"),
        seed=seed,
        tokenizer=TokenizerSettings(vocab_size=1024),
        training=TrainingSettings(eval_every=10**9, save_every=10**9),
    )
    run_dir = work / "run"
    run_dir.mkdir()
    prepare_tokenizer(settings, run_dir)
    prepare_data(settings, run_dir)
    run = build(settings, run_dir, budget_seconds=seconds)
    settings.max_steps = run.steps_in(seconds - seconds_since_process_start() - SAVING_SECONDS)
    train(run)


def seconds_since_process_start() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare (input.txt)")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions, with another seed of scratch-gpt each")
    parser.add_argument(
        "--compile", action="store_true", help="let nanoGPT compile (its README advises against it on a CPU)"
    )
    parser.add_argument("--train-for", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_for is not None:
        return train_ours(arguments.text, arguments.work, arguments.train_for, arguments.seed)
    if arguments.nanogpt is None or not (arguments.nanogpt / "train.py").is_file():
        parser.error("--nanogpt must name a checkout of github.com/karpathy/nanoGPT")
    if not arguments.text.is_file():
        parser.error(f"there is no file {arguments.text}")

    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            peer = run_nanogpt(arguments.nanogpt, arguments.text.resolve(), Path(temporary), arguments.compile)
        contestants = {"nanoGPT": peer}
        for name, share in (("scratch-gpt, a third of the time", 1 / 3), ("scratch-gpt, the same time", 1.0)):
            with tempfile.TemporaryDirectory() as temporary:
                contestants[name] = run_ours(arguments.text, Path(temporary), share * peer["seconds"], seed)
        for name, result in contestants.items():
            rows.setdefault(name, []).append(result)
            print(
                f"seed {seed}  {name:<33} {result['seconds']:6.1f} s  {result['bits_per_byte']:.3f} bits per byte",
                flush=True,
            )

    print(f"\n| {'median of ' + str(arguments.seeds):<33} | seconds | bits per byte | range         |")
    print(f"|{'-' * 35}|--------:|--------------:|---------------|")
    for name, results in rows.items():
        bits = [result["bits_per_byte"] for result in results]
        seconds = statistics.median(result["seconds"] for result in results)
        print(f"| {name:<33} | {seconds:7.1f} | {statistics.median(bits):13.3f} | {min(bits):.3f} - {max(bits):.3f} |")
    print(f"\n{os.cpu_count()} CPU cores, torch {torch.__version__}, nanoGPT compile={arguments.compile}")


if __name__ == "__main__":
    main()
