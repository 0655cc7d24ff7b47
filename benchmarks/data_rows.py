"""Measure the cost of packing, the document mask and the data loader on real text.

    python benchmarks/data_rows.py --texts austen_train.txt tinystories.txt

For each text (documents separated by a line ``<|endoftext|>``), with a 2,048-token tokenizer trained on it:

- for each packing: the fraction of padding, and of documents that would fit into one sequence but are split;
- sequences and tokens per second that one process reads from memory-mapped shards into batches;
- the cost of the document mask: forward and backward of the quickstart's model on the same sequences with and without
  it, alternately; median and range of the ratios;
- the fraction of step time that `scratch-gpt pretrain` waits for data, from its metrics.jsonl.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from scratch_gpt.config import ModelSettings, PhaseSettings, PretrainSettings, TokenizerSettings, TrainingSettings
from scratch_gpt.data.batches import Batch
from scratch_gpt.data.loader import TrainingData
from scratch_gpt.data.mixture import DataOrder, DataPosition
from scratch_gpt.data.packing import pack
from scratch_gpt.data.shards import TokenStream, read_manifest
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.distributed.materialize import build_model
from scratch_gpt.model.loading import build_config
from scratch_gpt.training.autotune import measure_forward_backward
from scratch_gpt.training.build import build
from scratch_gpt.training.metrics import read_metrics
from scratch_gpt.training.pretrain import prepare_data, prepare_tokenizer, train

PACKINGS = [("concat", False), ("concat", True), ("best_fit", False), ("best_fit", True)]


def fraction_split(data: TrainingData, context_length: int) -> float:
    """Return the fraction of documents of at most ``context_length`` tokens that are split between sequences."""
    stream, packing = data.streams["text"], data.order.packings["text"]
    starts = np.append(stream.document_starts(), len(stream))
    short = np.diff(starts) <= context_length
    sequence_of = np.empty(len(stream), dtype=np.int64)
    for number in range(packing.sequences_per_epoch):
        for first, count in packing.sequence(number):
            sequence_of[np.arange(first, first + count) % len(stream)] = number
    split = np.array([len(np.unique(sequence_of[begin:end])) > 1 for begin, end in pairwise(starts)])
    return float((split & short).sum() / max(short.sum(), 1))


def training_data(stream: TokenStream, packing: str, document_mask: bool, context_length: int) -> TrainingData:
    order = DataOrder(
        {"text": pack(stream, packing, context_length, document_mask, 0, "text")}, [PhaseSettings("only")]
    )
    return TrainingData({"text": stream}, order, context_length, document_mask, vocab_size=2**16)


def sequences_per_second(data: TrainingData, sequences: int, sequences_per_step: int = 8) -> float:
    cursor = data.order.at_step(DataPosition(), 0, 1)
    start = time.perf_counter()
    while cursor.row < sequences:
        cursor = data.read_step(cursor, sequences_per_step, 1).cursor
    return sequences / (time.perf_counter() - start)


def mask_cost(data: TrainingData, model: torch.nn.Module, sequences: int, precision: str, repeats: int) -> list[float]:
    """Return time with the mask / time without it, on the same sequences, for each of ``repeats`` pairs."""
    [masked] = data.read_step(data.order.at_step(DataPosition(), 0, 1), sequences, 1).batches
    plain = Batch(masked.input_ids, masked.targets)
    ratios = []
    for _ in range(repeats):
        with_mask, without = (measure_forward_backward(model, batch, precision, repeats=3) for batch in (masked, plain))
        ratios.append(with_mask / without)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="UTF-8 text files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512], help="sequence lengths in tokens")
    parser.add_argument("--sequences", type=int, default=4000, help="sequences to read when timing the loader")
    parser.add_argument("--steps", type=int, default=60, help="pretraining steps for the time spent waiting for data")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements for the cost of the mask")
    arguments = parser.parse_args()
    for text in arguments.texts:
        with tempfile.TemporaryDirectory() as temporary:
            benchmark(text, Path(temporary), arguments)


def benchmark(text: Path, work: Path, arguments: argparse.Namespace) -> None:
    training = TrainingSettings(eval_every=10**9, save_every=10**9)
    settings = PretrainSettings(
        corpus=str(text),
        run_dir=str(work),
        max_steps=arguments.steps,
        tokenizer=TokenizerSettings(vocab_size=2048),
        training=training,
    )
    prepare_tokenizer(settings, work)
    prepare_data(settings, work)
    stream = TokenStream.open(work / "data", "train", read_manifest(work / "data"))
    print(f"\n{text.name}: {len(stream):,} tokens, {len(stream.document_starts()):,} documents")

    print("\n| context | packing  | mask | padding | fitting documents split | sequences/s | tokens/s  |")
    print("|--------:|----------|------|--------:|------------------------:|------------:|----------:|")
    for context_length in arguments.contexts:
        for packing, document_mask in PACKINGS:
            data = training_data(stream, packing, document_mask, context_length)
            speed = sequences_per_second(data, arguments.sequences)
            padding = 1 - len(stream) / (data.order.packings["text"].sequences_per_epoch * context_length)
            split = fraction_split(data, context_length)
            print(
                f"| {context_length:7,} | {packing:<8} | {'yes' if document_mask else 'no':<4} | {padding:7.2%} | "
                f"{split:23.1%} | {speed:11,.0f} | {speed * context_length * (1 - padding):9,.0f} |"
            )

    print("\n| context | precision | masked / unmasked step | range       |")
    print("|--------:|-----------|-----------------------:|-------------|")
    config = build_config(
        ModelSettings(max_position_embeddings=max(arguments.contexts)), load_tokenizer(work / "tokenizer")
    )
    model = build_model(config, seed=0).train()
    for context_length in arguments.contexts:
        data = training_data(stream, "best_fit", True, context_length)
        for precision in ("bf16", "fp32"):
            ratios = mask_cost(data, model, max(1, 1024 // context_length), precision, arguments.repeats)
            print(
                f"| {context_length:7,} | {precision:<9} | {statistics.median(ratios):22.2f} | "
                f"{min(ratios):.2f} - {max(ratios):.2f} |"
            )

    print()
    train(build(settings, work))
    records = read_metrics(work / "metrics.jsonl")[1:]  # the first step cannot be prefetched
    steps = [(record["data_seconds"], step_seconds(record, before)) for before, record in pairwise(records)]
    waits = [wait / step for wait, step in steps]
    print(
        f"waiting for data: {sum(wait for wait, _ in steps) / sum(step for _, step in steps):.3%} of the time, median "
        f"{statistics.median(waits):.3%} of a step, at most {max(waits):.3%} ({len(waits)} steps of the quickstart's model)"
    )


def step_seconds(record: dict, before: dict) -> float:
    """Return the duration of a step, from the tokens and the rate in metrics.jsonl."""
    return (record["tokens"] - before["tokens"]) / record["tokens_per_second"]


if __name__ == "__main__":
    main()
