"""Worker processes. Each tokenizes one work unit at a time and writes its shards and a JSON record of them."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from scratch_gpt.data.dedup import Contamination, evaluation_texts, first_occurrences
from scratch_gpt.data.encoding import BackendEncoder, make_encoder
from scratch_gpt.data.records import read_slice
from scratch_gpt.data.shards import REMOVED, WORK, ShardWriter
from scratch_gpt.data.sources import Source, Split, document_digest
from scratch_gpt.data.work_units import WorkUnit
from scratch_gpt.errors import UserError
from scratch_gpt.files import flush, write_json
from scratch_gpt_command import start_worker


@dataclass(frozen=True)
class Job:
    """Everything that a worker process needs."""

    sources: dict[str, Source]
    output: Path
    tokenizer: str
    """JSON of the `tokenizers` tokenizer."""
    fast: bool
    dtype: str
    end_of_text: int
    deduplicate: bool
    decontaminate: tuple[str, ...]
    tokens_per_shard: int

    @property
    def work(self) -> Path:
        return self.output / WORK

    def record(self, unit: WorkUnit) -> Path:
        return self.work / "units" / f"{unit.name}.json"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """State that a process keeps from one unit to the next."""

    def __init__(self, job: Job):
        self.job = job
        tokenizer = Tokenizer.from_str(job.tokenizer)
        self.encoder = make_encoder(tokenizer, job.dtype) if job.fast else BackendEncoder(tokenizer, job.dtype)
        self.contamination = Contamination(evaluation_texts(job.decontaminate)) if job.decontaminate else None

    def documents(self, unit: WorkUnit, removed: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the unit's documents and their digests; count skipped records in ``removed``."""
        for file_slice in unit.slices:
            for document in read_slice(file_slice, self.job.sources[unit.source].read_options, removed):
                yield document, document_digest(document)


_worker: _Worker | None = None


def _start(job: Job, in_child: bool = True) -> None:
    global _worker
    if in_child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which terminates this one
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    _worker = _Worker(job)


def _end_with_the_main_process() -> None:
    """Exit when the main process ends: its lock is then free, and another run may write the same files."""
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def tokenize(unit: WorkUnit) -> None:
    """Write the unit's shards, then its record."""
    worker = _worker
    assert worker is not None
    job, source = worker.job, worker.job.sources[unit.source]
    keep = np.load(job.work / "keep" / f"{unit.name}.npy") if job.deduplicate else None
    removed: Counter[str] = Counter()
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(
            job.output,
            f"{unit.source}/{split}-{unit.number:05d}",
            job.work / "partial",
            dtype=job.dtype,
            end_of_text=job.end_of_text,
            tokens_per_shard=job.tokens_per_shard,
        )
        for split in ("train", "validation")
    }
    try:
        for number, (document, digest) in enumerate(worker.documents(unit, removed)):
            if keep is not None and not keep[number]:
                removed["duplicates"] += 1
            elif worker.contamination is not None and worker.contamination.found_in(document):
                removed["contaminated"] += 1
            else:
                for split, text in source.portions(document, unit.split, digest):
                    writers[split].add(worker.encoder.encode(text), len(text.encode("utf-8")))
        shards = [shard for writer in writers.values() for shard in writer.finish()]
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    flush(job.output / unit.source)
    write_json(job.record(unit), {"removed": {key: removed[key] for key in REMOVED}, "shards": shards})


def _digests(unit: WorkUnit) -> None:
    """Write 8 bytes of each document's digest, by which duplicates are found."""
    assert _worker is not None
    target = _worker.job.work / "digests" / f"{unit.name}.npy"
    if not target.is_file():
        # Not the bytes that decide what is held out, so that the two are independent.
        digests = b"".join(digest[8:16] for _, digest in _worker.documents(unit, Counter()))
        _save_array(target, np.frombuffer(digests, dtype="<u8"))


def find_duplicates(job: Job, units: list[WorkUnit], each: Callable[..., Iterator[None]]) -> None:
    """Save for each unit which documents to keep: first occurrences, with held-out files before all others."""
    for _ in each(_digests, units):
        pass
    order = sorted(units, key=lambda unit: unit.split != "validation")
    keep = first_occurrences([np.load(job.work / "digests" / f"{unit.name}.npy") for unit in order])
    for unit, kept in zip(order, keep, strict=True):
        _save_array(job.work / "keep" / f"{unit.name}.npy", kept)


def _save_array(target: Path, array: np.ndarray) -> None:
    temporary = target.with_suffix(f".{os.getpid()}.npy")
    np.save(temporary, array)
    temporary.replace(target)


@contextlib.contextmanager
def worker_processes(job: Job, processes: int) -> Iterator[Callable[..., Iterator[None]]]:
    """Yield ``each(function, units)``, which runs ``function`` on every unit, in this process or in several.

    If the block fails, the processes are terminated without waiting for their units.
    """
    if processes <= 1:
        _start(job, in_child=False)
        yield map
        return
    before = set(multiprocessing.active_children())
    # Workers start through scratch_gpt_command, which imports neither torch nor transformers.
    start = (f"{__name__}:{_start.__name__}", pickle.dumps((job,)))
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker, start)

    def each(function: Callable[[WorkUnit], None], units: list[WorkUnit]) -> Iterator[None]:
        try:
            yield from executor.map(function, units)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, possibly because memory ran out. Finished units are kept: run the same "
                "command again with fewer --workers"
            ) from error

    try:
        yield each
        executor.shutdown()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()
        raise
