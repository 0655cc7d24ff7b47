"""`data prepare` writes identical shards for any number of processes and any number of interruptions."""

import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from scratch_gpt.cli import main
from scratch_gpt.config import DataPrepareSettings, SourceSettings, TextSettings
from scratch_gpt.data import workers as workers_module
from scratch_gpt.data.encoding import encode
from scratch_gpt.data.prepare import prepare
from scratch_gpt.data.shards import TokenStream, read_manifest, totals, verify_checksums
from scratch_gpt.data.sources import bundled_corpus, read_documents, split_documents
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError

SMALL = 10_000
"""Bytes per work unit, so that a small corpus has many units."""


def content(folder: Path) -> dict[str, str]:
    """Return every file under ``folder`` with its checksum."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def texts(corpus, tmp_path_factory):
    """The 30 documents of ``corpus`` as three sources of different kinds."""
    folder = tmp_path_factory.mktemp("texts")
    documents = list(read_documents([corpus]))
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n<|endoftext|>\n".join(documents).encode()))
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"title": i, "body": d}) + "\n" for i, d in enumerate(documents))
    )
    pq.write_table(pa.table({"text": documents}), folder / "c.parquet", row_group_size=4)
    sources = {
        "zipped": SourceSettings(path=str(folder / "a.txt.gz")),
        "lines": SourceSettings(path=str(folder / "b.jsonl"), template="{title}: {body}"),
        "table": SourceSettings(path=str(folder / "c.parquet")),
    }
    return TextSettings(sources=sources, validation_fraction=0.2)


def test_each_source_holds_exactly_its_own_documents(texts, corpus, tokenizer_folder, tmp_path):
    manifest = prepare(texts, tokenizer_folder, tmp_path / "data", workers=1)
    assert list(manifest["sources"]) == ["zipped", "lines", "table"]
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = list(read_documents([corpus]))
    for name, prefix in (("zipped", False), ("lines", True), ("table", False)):
        found = []
        for split in ("train", "validation"):
            stream = TokenStream.open(tmp_path / "data", split, manifest, source=name)
            encoded = np.split(stream.read(0, len(stream)), stream.document_starts()[1:])
            assert all(ids[-1] == manifest["end_of_text"] for ids in encoded)
            found += [tokenizer.decode(ids[:-1]) for ids in encoded]
        assert sorted(found) == sorted(f"{i}: {d}" if prefix else d for i, d in enumerate(documents))
    train = TokenStream.open(tmp_path / "data", "train", manifest)
    assert len(train) == totals(manifest, "train")["tokens"]
    assert all(train.read(int(start) - 1, 1) == [manifest["end_of_text"]] for start in train.document_starts())
    texts_of = [text for documents in split_documents(texts)[:2] for text in documents]
    assert sum(totals(manifest, split)["bytes"] for split in ("train", "validation")) == sum(
        len(text.encode()) for text in texts_of
    )


def test_token_ids_equal_those_of_the_tokenizers_library(texts, tokenizer_folder, tmp_path):
    manifest = prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    stream = TokenStream.open(tmp_path / "data", "train", manifest)
    expected = TokenStream.of_documents(
        encode(split_documents(texts)[0], load_tokenizer(tokenizer_folder).backend_tokenizer), manifest["end_of_text"]
    )
    assert np.array_equal(stream.read(0, len(stream)), expected.read(0, len(expected)))
    assert np.array_equal(stream.document_starts(), expected.document_starts())
    assert stream.num_bytes == expected.num_bytes


def test_any_number_of_processes_writes_the_same_bytes(texts, tokenizer_folder, tmp_path):
    for number in (1, 3):
        prepare(
            texts,
            tokenizer_folder,
            tmp_path / str(number),
            workers=number,
            unit_bytes=SMALL,
            tokens_per_shard=3000,
        )
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert len([name for name in content(tmp_path / "1") if name.startswith("lines/train")]) > 10
    verify_checksums(tmp_path / "3", read_manifest(tmp_path / "3"))


class Interruption(Exception):
    pass


def interrupt_after(units, monkeypatch, exception):
    """Raise ``exception`` in the middle of the unit after the first ``units`` units."""
    add, finish = workers_module.ShardWriter.add, workers_module.write_json
    done = []

    def counted(*arguments):
        finish(*arguments)
        done.append(arguments)

    def failing(self, ids, num_bytes):
        add(self, ids, num_bytes)
        if len(done) == units:
            raise exception

    monkeypatch.setattr(workers_module, "write_json", counted)
    monkeypatch.setattr(workers_module.ShardWriter, "add", failing)


@pytest.fixture(scope="module")
def uninterrupted(texts, tokenizer_folder, tmp_path_factory):
    """The files that an uninterrupted preparation writes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    prepare(texts, tokenizer_folder, folder, workers=1, unit_bytes=SMALL)
    return content(folder)


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), OSError(28, "No space left on device"), Interruption()])
@pytest.mark.parametrize("units", [0, 3])
def test_the_same_command_resumes_after_an_interruption(
    exception, units, uninterrupted, texts, tokenizer_folder, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_after(units, patch, exception)
        with pytest.raises(UserError if isinstance(exception, OSError) else type(exception)):
            prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
        assert not list((tmp_path / "data").rglob("partial/*"))
    if units or not isinstance(exception, OSError):
        with pytest.raises(
            UserError, match="is not finished: resume it with the same `scratch-gpt data prepare` command"
        ):
            read_manifest(tmp_path / "data")
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").glob("*/*.bin")}
    assert bool(finished) == bool(units)
    prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    assert content(tmp_path / "data") == uninterrupted
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())


def test_a_finished_unit_with_a_truncated_file_is_redone(uninterrupted, texts, tokenizer_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, Interruption())
        with pytest.raises(Interruption):
            prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    os.truncate(next((tmp_path / "data").glob("*/*.bin")), 10)
    prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    assert content(tmp_path / "data") == uninterrupted


def test_an_unfinished_preparation_with_other_settings_names_the_difference(
    texts, tokenizer_folder, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_after(1, patch, Interruption())
        with pytest.raises(Interruption):
            prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    before = content(tmp_path / "data")
    with pytest.raises(UserError, match="holds an unfinished preparation with a different deduplicate: choose another"):
        prepare(texts, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL, deduplicate=True)
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="with a different tokenizer"):
        prepare(texts, other, tmp_path / "data", workers=1, unit_bytes=SMALL)
    assert content(tmp_path / "data") == before


KILLED = """
import sys
import scratch_gpt.data.prepare
from scratch_gpt.cli import main
scratch_gpt.data.prepare.UNIT_BYTES = {unit_bytes}
if __name__ == "__main__":
    sys.exit(main({arguments!r}))
"""


def start(corpus, tokenizer_folder, output, workers, unit_bytes):
    arguments = ["data", "prepare", "--corpus", str(corpus), "--tokenizer-path", str(tokenizer_folder)]
    arguments += ["--output", str(output), "--workers", str(workers), "--deduplicate"]
    script = output.with_name(f"{output.name}.py")
    script.write_text(KILLED.format(unit_bytes=unit_bytes, arguments=arguments))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process, when):
    """Kill ``process`` ``when`` seconds after it finished its first unit, unless it ends before."""
    output = Path(process.args[1]).with_suffix("")
    while not list(output.glob(".prepare/units/*.json")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(when)
    process.kill()
    process.wait()


def test_shards_are_identical_after_kill_9(corpus, tokenizer_folder, tmp_path):
    for output, processes in (("uninterrupted", 1), ("killed", 2)):
        process = start(corpus, tokenizer_folder, tmp_path / output, processes, SMALL // 4)
        if output == "killed":
            kill(process, 0.05)
            assert (tmp_path / "killed" / ".prepare").is_dir()
            assert not (tmp_path / "killed" / "manifest.json").exists()
            process = start(corpus, tokenizer_folder, tmp_path / output, 1, SMALL // 4)
        assert "training tokens" in process.communicate()[0]
    assert content(tmp_path / "killed") == content(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_shards_are_identical_after_kill_9_at_many_random_moments(tokenizer_folder, tmp_path):
    text = bundled_corpus("train").read_text(encoding="utf-8")
    slices = [text[start : start + 3000].strip() for start in range(0, len(text), 2971)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n<|endoftext|>\n".join(f"{copy} {file_slice}" for copy in range(30) for file_slice in slices))
    process = start(corpus, tokenizer_folder, tmp_path / "uninterrupted", 1, 500_000)
    assert "training tokens" in process.communicate()[0]
    chance = random.Random(0)
    killed = 0
    while not (tmp_path / "killed" / "manifest.json").exists():
        process = start(corpus, tokenizer_folder, tmp_path / "killed", 2, 500_000)
        if killed % 3 == 2:  # at any moment, imports included
            time.sleep(chance.uniform(0, 6))
            process.kill()
            process.wait()
        else:
            kill(process, chance.uniform(0, 1.5))
        killed += 1
    process = start(corpus, tokenizer_folder, tmp_path / "killed", 2, 500_000)
    assert "training tokens" in process.communicate()[0]
    assert killed >= 4
    assert content(tmp_path / "killed") == content(tmp_path / "uninterrupted")


def test_ctrl_c_ends_all_processes_and_says_how_to_resume(corpus, tokenizer_folder, tmp_path):
    many = tmp_path / "many.txt"  # long enough for the signal to come in time
    many.write_text("\n<|endoftext|>\n".join(f"{copy} {corpus.read_text()}" for copy in range(100)))
    process = start(many, tokenizer_folder, tmp_path / "data", 2, SMALL)
    while not list((tmp_path / "data").glob(".prepare/units/*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # so that it cannot finish before the signal
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 75, printed
    assert "run the same command again to resume" in printed
    assert "Traceback" not in printed
    latest = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children.split()):
        assert time.monotonic() < latest
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_is_reported_in_one_message(corpus, tokenizer_folder, tmp_path):
    many = tmp_path / "many.txt"  # long enough for the signal to come in time
    many.write_text("\n<|endoftext|>\n".join(f"{copy} {corpus.read_text()}" for copy in range(100)))
    process = start(many, tokenizer_folder, tmp_path / "data", 2, SMALL)
    while not list((tmp_path / "data").glob(".prepare/units/*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 2, printed
    assert "a worker process was killed" in printed


def test_a_second_run_in_the_same_folder_is_refused(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing .*data: wait for it"):
            prepare(TextSettings(corpus=str(corpus)), tokenizer_folder, tmp_path / "data")
    assert prepare(TextSettings(corpus=str(corpus)), tokenizer_folder, tmp_path / "data")


def test_a_full_disk_is_reported_in_one_message_and_finished_units_are_kept(corpus, tokenizer_folder, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    slices = list(read_documents([corpus]))
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join([*slices[:25], "\n".join(slices) * 4, "the end"]))
    arguments = ["data", "prepare", "--corpus", str(text), "--tokenizer-path", str(tokenizer_folder), "--workers", "1"]
    arguments += ["--output", str(tmp_path / "data")]
    (tmp_path / "run.py").write_text(KILLED.format(unit_bytes=30_000, arguments=arguments))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "could not write token shards in" in done.stderr
    assert "File too large" in done.stderr
    assert list((tmp_path / "data").glob("corpus/train-*.bin"))
    assert not list((tmp_path / "data").rglob("partial/*"))
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_broken_record_stops_the_run_or_is_skipped_and_finished_units_are_kept(corpus, tokenizer_folder, tmp_path):
    lines = [json.dumps({"text": document}) for document in read_documents([corpus])]
    lines[25] = '{"text": "cut off'
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"text": " "})]))
    settings = TextSettings(corpus=str(tmp_path / "a.jsonl"), validation_fraction=0.2, on_bad_record="stop")
    with pytest.raises(UserError, match=r"a.jsonl, line 26: not JSON: Unterminated string.* --on-bad-record skip"):
        prepare(settings, tokenizer_folder, tmp_path / "data", workers=2, unit_bytes=SMALL)
    # a unit is finished if it has a record; others are redone
    records = [json.loads(file.read_text()) for file in (tmp_path / "data" / ".prepare" / "units").glob("*.json")]
    files = [tmp_path / "data" / f"{shard['name']}.bin" for record in records for shard in record["shards"]]
    finished = {file: file.stat().st_mtime_ns for file in files}
    settings.on_bad_record = "skip"
    manifest = prepare(settings, tokenizer_folder, tmp_path / "data", workers=1, unit_bytes=SMALL)
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items())
    removed = {"duplicates": 0, "contaminated": 0, "broken": 1, "empty": 1}
    assert manifest["sources"]["corpus"]["removed"] == removed
    assert sum(totals(manifest, split)["documents"] for split in ("train", "validation")) == len(lines) - 1


def test_a_preparation_that_fails_before_its_first_unit_leaves_no_files(tokenizer_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 30 + "{\n")
    settings = TextSettings(corpus=str(tmp_path / "a.jsonl"), on_bad_record="stop")
    with pytest.raises(UserError, match="line 31"):
        prepare(settings, tokenizer_folder, tmp_path / "data")
    (tmp_path / "a.jsonl").write_text('{"text": "the same"}\n' * 30)
    with pytest.raises(UserError, match="corpus: no text is left for the (train|validation) split"):
        prepare(settings, tokenizer_folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_duplicates_across_sources_are_removed_and_the_first_occurrence_is_kept(corpus, tokenizer_folder, tmp_path):
    documents = list(read_documents([corpus]))
    for name, own in (("a", documents[:22]), ("b", documents[10:] + documents[:3])):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(own))
    (tmp_path / "held_out.txt").write_text(documents[29])
    sources = {name: SourceSettings(path=str(tmp_path / f"{name}.txt")) for name in ("a", "b")}
    sources["b"].validation_path = str(tmp_path / "held_out.txt")
    settings = TextSettings(sources=sources, validation_fraction=0.3)
    manifest = prepare(settings, tokenizer_folder, tmp_path / "data", deduplicate=True, unit_bytes=SMALL, workers=1)
    counts = {
        name: [entry["splits"][split]["documents"] for split in ("train", "validation")]
        for name, entry in manifest["sources"].items()
    }
    assert sum(counts["a"]) == 22
    assert counts["b"] == [7, 1]  # documents 22 to 28; 29 is held out
    assert manifest["sources"]["a"]["removed"]["duplicates"] == 0
    assert manifest["sources"]["b"]["removed"]["duplicates"] == 12 + 1 + 3


def test_documents_that_contain_evaluation_text_are_removed(corpus, tokenizer_folder, tmp_path):
    documents = list(read_documents([corpus]))
    question = " ".join(documents[5].split()[30:50])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": question.upper()}) + "\n")
    manifest = prepare(
        TextSettings(corpus=str(corpus), validation_fraction=0.2),
        tokenizer_folder,
        tmp_path / "data",
        decontaminate=[str(tmp_path / "eval.jsonl")],
    )
    assert manifest["sources"]["corpus"]["removed"]["contaminated"] == 1
    tokenizer = load_tokenizer(tokenizer_folder)
    for split in ("train", "validation"):
        stream = TokenStream.open(tmp_path / "data", split, manifest)
        assert question not in tokenizer.decode(stream.read(0, len(stream)))


def test_the_validation_split_is_stable_when_text_is_added(corpus, tokenizer_folder, tmp_path):
    documents = list(read_documents([corpus]))
    held_out = []
    for count in (24, 30):
        (tmp_path / f"{count}.txt").write_text("\n<|endoftext|>\n".join(documents[:count]))
        settings = TextSettings(corpus=str(tmp_path / f"{count}.txt"), validation_fraction=0.3)
        manifest = prepare(settings, tokenizer_folder, tmp_path / str(count))
        stream = TokenStream.open(tmp_path / str(count), "validation", manifest)
        held_out.append({tuple(ids) for ids in np.split(stream.read(0, len(stream)), stream.document_starts()[1:])})
    assert held_out[0] <= held_out[1]


def test_special_tokens_in_a_text_are_encoded_as_text(tokenizer_folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(f"{i} <|endoftext|> <|pad|> b" for i in range(60)))
    manifest = prepare(TextSettings(corpus=str(tmp_path / "a.txt")), tokenizer_folder, tmp_path / "data")
    stream = TokenStream.open(tmp_path / "data", "train", manifest)
    tokens = stream.read(0, len(stream))
    assert set(tokens.tolist()) & {0, 1, 2, 3} == {manifest["end_of_text"]} == {0}
    assert (tokens == 0).sum() == manifest["sources"]["corpus"]["splits"]["train"]["documents"]


@pytest.mark.slow
def test_a_document_of_100_megabytes_on_one_line_takes_bounded_time_and_memory(tokenizer_folder, tmp_path):
    text = " ".join(bundled_corpus("train").read_text(encoding="utf-8").split())
    line = (text * (100_000_000 // len(text) + 1))[:100_000_000]
    (tmp_path / "long.txt").write_text(line, encoding="utf-8")
    arguments = ["data", "prepare", "--corpus", str(tmp_path / "long.txt"), "--workers", "1"]
    arguments += ["--tokenizer-path", str(tokenizer_folder), "--output", str(tmp_path / "data")]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "scratch_gpt", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 120
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_300_000  # kB
    manifest = read_manifest(tmp_path / "data")
    stream = TokenStream.open(tmp_path / "data", "train", manifest)
    short = tmp_path / "short"
    (tmp_path / "short.txt").write_text(line[:1_000_000])
    prepare(TextSettings(corpus=str(tmp_path / "short.txt")), tokenizer_folder, short)
    same = TokenStream.open(short, "train", read_manifest(short))
    assert np.array_equal(stream.read(0, len(same) - 5), same.read(0, len(same) - 5))


def test_several_sources_can_be_configured_in_yaml(corpus, texts, tokenizer_folder, tmp_path, capsys):
    sources = {name: {"path": one.path, "template": one.template} for name, one in texts.sources.items()}
    settings = {"sources": sources, "validation_fraction": 0.2, "output": str(tmp_path / "data")}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(settings | {"tokenizer_path": str(tokenizer_folder)}))
    assert main(["data", "prepare", "--config", str(tmp_path / "mixture.yaml")]) == 0
    assert main(["data", "inspect", "--path", str(tmp_path / "data"), "--tokenizer-path", str(tokenizer_folder)]) == 0
    printed = capsys.readouterr().out
    for name in sources:
        assert f"  {name}: " in printed
        assert f"{name}, train, tokens 0 to 127:" in printed


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {}}, "the source a needs a path or a dataset"),
        ({"a": {"path": "x", "dataset": "y"}}, "the source a needs a path or a dataset, not both"),
        ({"a/b": {"path": "x"}}, "invalid source name 'a/b'"),
        ({"a": {"path": "x", "template": "{"}}, "the template '{' is malformed"),
        ({"a": {"path": "x", "template": "text"}}, "must name columns"),
        ({"a": {"path": "absent"}}, "there is no text file absent"),
        ({"a": {"pth": "absent"}}, "unknown setting 'pth'|pth"),
    ],
)
def test_an_invalid_source_is_refused(sources, message, tmp_path, capsys):
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources, "output": str(tmp_path / "data")}))
    assert main(["data", "prepare", "--config", str(tmp_path / "mixture.yaml")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_corpus_and_sources_together_are_refused(corpus):
    settings = DataPrepareSettings(corpus=str(corpus), sources={"a": SourceSettings(path=str(corpus))})
    with pytest.raises(UserError, match="give --corpus or --sources, not both"):
        split_documents(settings)
