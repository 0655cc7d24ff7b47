"""Compare tokenization speed: scratch-gpt, `datasets.map` and nanoGPT's prepare.py, on one core and on all.

    pip install tiktoken
    python benchmarks/data_prepare.py --text stories.txt --tokenizer gpt2/

``--text`` holds documents that end at a line ``<|endoftext|>``; ``--tokenizer`` is a folder with GPT-2's tokenizer.json,
vocab.json and merges.txt. The methods run alternately, each in its own process, ``--repeats`` times; the median and the
range are reported.

- scratch-gpt: `data prepare`, from the text file to shards with checksums, flushed to disk, including the start of its
  worker processes.
- datasets.map: the same tokenizer, batched, on a loaded dataset; the result is an Arrow file.
- nanoGPT: as in its data/openwebtext/prepare.py, tiktoken's encode_ordinary on each document of a loaded dataset; then
  the ids are written to one file through numpy's memmap.

Imports are not timed. The second table reports scratch-gpt's peak memory (of its largest process) on 30 MB and 300 MB of
text: copies of the text, with a number before each document that differs between copies.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEPARATOR = "\n<|endoftext|>\n"


def documents_of(text: Path) -> list[str]:
    documents = text.read_text(encoding="utf-8").split("<|endoftext|>\n")
    return [document.rstrip("\n") for document in documents if document.strip()]


def scratch_gpt(text: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, float]:
    from scratch_gpt.config import TextSettings
    from scratch_gpt.data.prepare import prepare
    from scratch_gpt.data.shards import totals
    from scratch_gpt.data.tokenizer import load_tokenizer

    load_tokenizer(tokenizer)  # imports transformers before timing
    begin = time.perf_counter()
    manifest = prepare(TextSettings(corpus=str(text)), tokenizer, work / "data", workers=workers)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "tokens": totals(manifest, "train")["tokens"] + totals(manifest, "validation")["tokens"],
    }


def datasets_map(text: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    encode = AutoTokenizer.from_pretrained(tokenizer)
    dataset = datasets.Dataset.from_dict({"text": documents_of(text)})
    dataset.save_to_disk(work / "text")
    dataset = datasets.load_from_disk(work / "text")
    begin = time.perf_counter()
    mapped = dataset.map(
        lambda batch: {"ids": encode(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        remove_columns="text",
        num_proc=workers if workers > 1 else None,
    )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(len(batch) + 1 for batch in mapped["ids"])}


def nanogpt(text: Path, tokenizer: Path, work: Path, workers: int) -> dict[str, float]:
    import datasets
    import numpy as np

    datasets.disable_caching()
    _, end = tiktoken_of(tokenizer)
    datasets.Dataset.from_dict({"text": documents_of(text)}).save_to_disk(work / "text")
    dataset = datasets.load_from_disk(work / "text")

    def process(example):
        ids = tiktoken_of(tokenizer)[0](example["text"])
        ids.append(end)
        return {"ids": ids, "len": len(ids)}

    begin = time.perf_counter()
    mapped = dataset.map(process, remove_columns=["text"], num_proc=workers if workers > 1 else None)
    total = int(np.sum(mapped["len"], dtype=np.uint64))
    written = np.memmap(work / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    position, batches = 0, min(1024, len(mapped))
    for index in range(batches):
        batch = mapped.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        written[position : position + len(ids)] = ids
        position += len(ids)
    written.flush()
    return {"seconds": time.perf_counter() - begin, "tokens": total}


_TIKTOKEN: dict[Path, tuple] = {}


def tiktoken_of(folder: Path) -> tuple:
    """Build tiktoken's GPT-2 encoding from vocab.json: (encode function, end-of-text id). Needs no network."""
    if folder not in _TIKTOKEN:
        import tiktoken

        from scratch_gpt.data.encoding import _byte_alphabet

        byte_of = {chr(character): byte for byte, character in _byte_alphabet().items()}
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        end = vocabulary.pop("<|endoftext|>")
        ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
        # tiktoken's own pattern for r50k_base
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        _TIKTOKEN[folder] = encoding.encode_ordinary, end
    return _TIKTOKEN[folder]


METHODS = {"scratch-gpt": scratch_gpt, "datasets.map": datasets_map, "nanoGPT": nanogpt}


def run(name: str, text: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Run one method in its own process: {"seconds", "tokens", "megabytes"}."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    command = [sys.executable, __file__, "--text", str(text), "--tokenizer", str(tokenizer), "--one", name]
    done = subprocess.run([*command, str(workers)], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the GPT-2 tokenizer")
    parser.add_argument("--repeats", type=int, default=3, help="runs per method (default: 3)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes (default: all cores)"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, workers = arguments.one
        with tempfile.TemporaryDirectory() as work:
            result = METHODS[name](arguments.text, arguments.tokenizer, Path(work), int(workers))
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps({**result, "megabytes": max(peaks) / 1000}))
        return

    print(f"{arguments.text.stat().st_size / 1e6:.1f} MB of text, median of {arguments.repeats} (range)\n")
    print("| | processes | seconds | tokens/s | tokens/s per core |\n|---|---:|---:|---:|---:|")
    for workers in sorted({1, arguments.workers}):
        results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for _ in range(arguments.repeats):
            for name in METHODS:
                results[name].append(run(name, arguments.text, arguments.tokenizer, workers))
        counts = {result["tokens"] for of_method in results.values() for result in of_method}
        assert len(counts) == 1, f"the methods disagree on the number of tokens: {counts}"
        for name, of_method in results.items():
            seconds = [result["seconds"] for result in of_method]
            rate = of_method[0]["tokens"] / statistics.median(seconds)
            timing = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
            print(f"| {name} | {workers} | {timing} | {rate:,.0f} | {rate / workers:,.0f} |", flush=True)

    print("\n| text | processes | peak memory of the largest process |\n|---:|---:|---:|")
    documents = documents_of(arguments.text)
    size = sum(len(document.encode("utf-8")) + len(SEPARATOR) for document in documents)
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (30, 300):
            text = Path(folder) / f"{megabytes}.txt"
            with text.open("w", encoding="utf-8") as file:
                for copy in range(round(megabytes * 1e6 / size)):
                    file.writelines(f"{copy}. {document}{SEPARATOR}" for document in documents)
            for workers in sorted({1, arguments.workers}):
                peak = run("scratch-gpt", text, arguments.tokenizer, workers)["megabytes"]
                print(f"| {text.stat().st_size / 1e6:.0f} MB | {workers} | {peak:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
