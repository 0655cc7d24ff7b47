"""Text to token shards: `scratch-gpt data prepare`.

The text is cut into work units, which depend on the text alone. Worker processes tokenize them; a finished unit has its
shards under their final names, flushed to disk, and a record of them. The manifest is written last. An interrupted
preparation resumes with the units that have no record, and the result is identical, byte for byte, however often it was
interrupted and for any number of processes.

    output/.lock  .prepare/{plan.json, units/, digests/, keep/, partial/}     during preparation
    output/{source}/{split}-{unit}.bin .docs  manifest.json                   the result, see shards.py
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from scratch_gpt.config import DataPrepareSettings, TextSettings
from scratch_gpt.console import print0, progress_bar
from scratch_gpt.data.encoding import BackendEncoder, make_encoder
from scratch_gpt.data.shards import (
    FORMAT,
    MANIFEST,
    REMOVED,
    TOKENS_PER_SHARD,
    WORK,
    read_manifest,
    split_entry,
    token_dtype,
    totals,
)
from scratch_gpt.data.sources import Source, build_sources, read_locations
from scratch_gpt.data.tokenizer import end_of_text, fingerprint, load_tokenizer
from scratch_gpt.data.work_units import WorkUnit, describe, plan_units, same_as
from scratch_gpt.data.workers import Job, available_cores, find_duplicates, tokenize, worker_processes
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, locked, write_json

UNIT_BYTES = 2**24
"""Smallest size of a work unit, in bytes of its files."""
LOCK = ".lock"


def prepare(
    settings: TextSettings,
    tokenizer_path: str | Path,
    output: Path,
    *,
    deduplicate: bool = False,
    decontaminate: Sequence[str] = (),
    workers: int | None = None,
    unit_bytes: int | None = None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> dict[str, Any]:
    """Tokenize the texts into ``output`` and return the manifest. Shards of the same text and tokenizer are kept.

    Raises:
        UserError: unreadable text, no held-out text, a folder that holds something else or is in use, a full disk.
            Finished units are kept, and the same call resumes.
    """
    sources = {source.name: source for source in build_sources(settings)}
    tokenizer = load_tokenizer(tokenizer_path)
    backend: Tokenizer = tokenizer.backend_tokenizer
    vocab_size = max(backend.get_vocab().values()) + 1
    head: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": fingerprint(tokenizer_path),
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size),
        "end_of_text": end_of_text(tokenizer),
    }
    plan = {**head, "sources": describe(sources.values(), deduplicate, decontaminate)}
    if (output / MANIFEST).is_file() and not (output / WORK).exists():
        return same_as(read_manifest(output), plan, output)
    if output.exists() and not (output / WORK).exists() and any(file.name != LOCK for file in output.iterdir()):
        raise UserError(f"{output} holds files that are not token shards: choose another folder")

    job = Job(
        sources=sources,
        output=output,
        tokenizer=backend.to_str(),
        fast=_fast_encoder_agrees(backend, head["dtype"], sources.values()),
        dtype=head["dtype"],
        end_of_text=head["end_of_text"],
        deduplicate=deduplicate,
        decontaminate=tuple(decontaminate),
        tokens_per_shard=tokens_per_shard,
    )
    with disk_errors(f"token shards in {output} (finished units are kept; run the same command again to resume)"):
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / LOCK, str(output)):
            return _prepare(job, plan, workers or available_cores(), unit_bytes or UNIT_BYTES)


def _prepare(job: Job, plan: dict[str, Any], workers: int, unit_bytes: int) -> dict[str, Any]:
    """Start or resume; the output folder is locked."""
    if (job.output / MANIFEST).is_file():  # killed while cleaning up
        shutil.rmtree(job.work, ignore_errors=True)
        return same_as(read_manifest(job.output), plan, job.output)
    units = [unit for source in job.sources.values() for unit in plan_units(source, unit_bytes)]
    plan_file = job.work / "plan.json"
    full_plan = {**plan, "units": [unit.as_json() for unit in units], "tokens_per_shard": job.tokens_per_shard}
    if plan_file.is_file():
        same_as(json.loads(plan_file.read_text(encoding="utf-8")), full_plan, job.output, "an unfinished preparation")
    shutil.rmtree(job.work / "partial", ignore_errors=True)
    for folder in ("partial", "units", "digests", "keep"):
        (job.work / folder).mkdir(parents=True, exist_ok=True)
    for name in job.sources:
        (job.output / name).mkdir(exist_ok=True)
    write_json(plan_file, full_plan)

    todo = [unit for unit in units if not _is_finished(job, unit)]
    try:
        with worker_processes(job, min(workers, len(todo))) as each:
            if job.deduplicate and todo:
                find_duplicates(job, units, each)
            with progress_bar("tokenizing", len(units), len(units) - len(todo)) as bar:
                for done, _ in enumerate(each(tokenize, todo), len(units) - len(todo) + 1):
                    bar.update(done, f"{done}/{len(units)}")
    except UserError:
        if not any(_is_finished(job, unit) for unit in units):
            _discard(job)
        raise
    try:
        manifest = _manifest(job, plan, units)
    except UserError:
        _discard(job)
        raise
    write_json(job.output / MANIFEST, manifest)
    shutil.rmtree(job.work)
    (job.output / LOCK).unlink()
    return manifest


def _is_finished(job: Job, unit: WorkUnit) -> bool:
    """Return whether the unit has a record and its files have the recorded sizes."""
    if not job.record(unit).is_file():
        return False
    record = json.loads(job.record(unit).read_text(encoding="utf-8"))
    itemsize = np.dtype(job.dtype).itemsize
    return all(
        file.is_file() and file.stat().st_size == size
        for shard in record["shards"]
        for file, size in (
            (job.output / f"{shard['name']}.bin", shard["tokens"] * itemsize),
            (job.output / f"{shard['name']}.docs", shard["documents"] * 8),
        )
    )


def _manifest(job: Job, plan: dict[str, Any], units: list[WorkUnit]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name in job.sources:
        records = [json.loads(job.record(unit).read_text(encoding="utf-8")) for unit in units if unit.source == name]
        splits: dict[str, Any] = {}
        for split in ("train", "validation"):
            shards = [shard for record in records for shard in record["shards"] if _split_of(shard) == split]
            splits[split] = split_entry(shards, split, name)
        removed = {key: sum(record["removed"][key] for record in records) for key in REMOVED}
        entries[name] = {**plan["sources"][name], "removed": removed, "splits": splits}
    return {**plan, "sources": entries}


def _split_of(shard: dict[str, Any]) -> str:
    return str(shard["name"]).rsplit("/", 1)[1].split("-")[0]


def _discard(job: Job) -> None:
    """Delete all files of a preparation that cannot be finished."""
    for folder in (job.work, *(job.output / name for name in job.sources)):
        shutil.rmtree(folder, ignore_errors=True)
    (job.output / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder may hold the user's own files
        job.output.rmdir()


def _fast_encoder_agrees(backend: Tokenizer, dtype: str, sources: Iterable[Source]) -> bool:
    """Return whether the fast encoder and `tokenizers` give the same ids for the beginning of each source."""
    reference = BackendEncoder(backend, dtype)
    encoder = make_encoder(backend, dtype)
    if isinstance(encoder, BackendEncoder):
        return False
    for source in sources:
        lenient = replace(source.read_options, on_bad_record="skip")
        for text in islice(read_locations(source.locations, lenient), 20):
            if encoder.encode(text[:50_000]) != reference.encode(text[:50_000]):
                print0("the fast encoder disagrees with this tokenizer: encoding with `tokenizers`, which is slower")
                return False
    return True


# ------------------------------------------------------------------------------------------------ the command


def summary(manifest: dict[str, Any]) -> str:
    """Return one line about all sources."""
    train, validation = totals(manifest, "train"), totals(manifest, "validation")
    held_out = "; ".join(dict.fromkeys(entry["held_out"] for entry in manifest["sources"].values()))
    return (
        f"{train['tokens']:,} training tokens, {validation['tokens']:,} held out ({held_out}), "
        f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes per token"
    )


def source_summary(name: str, entry: dict[str, Any]) -> str:
    """Return one line about a source."""
    train, validation = entry["splits"]["train"], entry["splits"]["validation"]
    removed = ", ".join(f"{count:,} {what}" for what, count in entry["removed"].items() if count)
    return (
        f"{name}: {train['tokens']:,} training tokens in {train['documents']:,} documents, "
        f"{validation['tokens']:,} held out in {validation['documents']:,} ({entry['held_out']})"
        + (f"; removed: {removed}" if removed else "")
    )


def prepare_command(settings: DataPrepareSettings) -> None:
    """`scratch-gpt data prepare`."""
    manifest = prepare(
        settings,
        settings.tokenizer_path,
        Path(settings.output),
        deduplicate=settings.deduplicate,
        decontaminate=settings.decontaminate,
        workers=settings.workers,
    )
    print(f"{settings.output}: {summary(manifest)}")
    for name, entry in manifest["sources"].items():
        print(f"  {source_summary(name, entry)}")
