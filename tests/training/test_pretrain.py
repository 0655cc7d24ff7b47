"""Runs of `scratch-gpt pretrain`: what they write, how they stop and resume, what they refuse."""

import json
import os
import re
import shutil
import signal

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from scratch_gpt.cli import main
from scratch_gpt.training.checkpoint import find_checkpoint
from scratch_gpt.training.metrics import read_metrics
from tests.training.runs import STEPS, arguments, assert_same_run, losses, start, wait_for_step


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments(run_dir, corpus)) == 0
    return run_dir


def test_a_run_writes_its_metrics_config_checkpoints_and_model(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    needed = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "time"}
    assert all(needed <= record.keys() for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert [r["step"] for r in records if "validation_bits_per_byte" in r] == [6, 12]
    assert yaml.safe_load((finished / "config.yaml").read_text())["max_steps"] == STEPS
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("name", ["final", "checkpoint-8", "checkpoint-12"])
def test_every_checkpoint_is_a_hugging_face_model(finished, name):
    model = AutoModelForCausalLM.from_pretrained(finished / name)
    tokenizer = AutoTokenizer.from_pretrained(finished / name)
    assert type(model).__name__ == "ScratchGPTForCausalLM"
    assert model.lm_head.weight is model.transformer.wte.weight
    output = model.generate(**tokenizer("It was", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert output.shape[1] > 3
    files = {file.name for file in (finished / name).rglob("*") if file.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert expected | {"modeling_scratch_gpt.py", "configuration_scratch_gpt.py"} <= files
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_same_command_again_reports_that_it_is_finished(finished, corpus, capsys):
    before = (finished / "final" / "model.safetensors").stat().st_mtime_ns
    assert main(arguments(finished, corpus)) == 0
    assert "is finished" in capsys.readouterr().out
    assert (finished / "final" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_with_75_and_resumes_bit_for_bit(number, finished, corpus, tmp_path, capsys):
    process = start(tmp_path / "run", corpus)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "The same command resumes" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "final").exists()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert "resumed" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_run_resumes_bit_for_bit(step, finished, corpus, tmp_path):
    process = start(tmp_path / "run", corpus)
    wait_for_step(process, tmp_path / "run", step)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert main(arguments(tmp_path / "run", corpus)) == 0
    assert_same_run(tmp_path / "run", finished)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is damaged"),
        (
            lambda folder: flip_a_bit(folder / "trainer_state" / "optimizer.safetensors"),
            "optimizer.safetensors is damaged",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors is damaged"),
        (lambda folder: (folder / "trainer_state" / "complete.json").unlink(), "was not finished"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_an_invalid_checkpoint_is_named_and_the_one_before_is_used(mishap, message, finished, corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "final")
    mishap(run_dir / "checkpoint-12")
    assert main(arguments(run_dir, corpus)) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint-12 is not used: {message}" in printed or message in printed
    assert "resumed    checkpoint-8" in printed
    assert_same_run(run_dir, finished)
    assert find_checkpoint(run_dir)[0].name == "checkpoint-12"


def test_a_record_lost_between_checkpoint_and_metrics_is_written_on_resume(finished, corpus, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "final")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert main(arguments(run_dir, corpus)) == 0
    last, expected = read_metrics(run_dir / "metrics.jsonl")[-1], json.loads(lines[-1])
    for key in ("step", "loss", "validation_bits_per_byte"):
        assert last[key] == expected[key]


def test_a_longer_run_resumes_from_the_last_step(finished, corpus, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    longer = [*arguments(run_dir, corpus), "--max-steps", "14"]
    # ended before the longer run could write its model: the shorter run's must not count as it
    monkeypatch.setattr("scratch_gpt.training.pretrain.save_final_model", lambda *_: None)
    assert main(longer) == 0
    assert "resumed    checkpoint-12" in capsys.readouterr().out
    assert not (run_dir / "final").exists()
    monkeypatch.undo()
    assert main(longer) == 0
    assert "is finished" not in capsys.readouterr().out
    assert max(losses(run_dir)) == 14
    assert (run_dir / "final" / "model.safetensors").is_file()


def test_a_run_that_diverges_stops_with_its_weights_intact(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    wild = ["--training.learning_rate", "1e30", "--training.save_every", "1", "--training.warmup_steps", "0"]
    assert main([*arguments(run_dir, corpus, *wild), "--model.overrides.qk_norm", "false"]) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"step \d+: the (loss|gradient norm) is .*; the step was skipped.* Lower --training.learning_rate", error
    )


def test_changed_shards_are_refused_on_resume(corpus, tokenizer_folder, tmp_path, capsys):
    data, other = tmp_path / "data", tmp_path / "other.txt"
    other.write_text(corpus.read_text()[:50_000])
    run = arguments(tmp_path / "run", corpus, "--tokenizer-path", str(tokenizer_folder), "--data-path", str(data))
    for text, steps, exit_code in ((corpus, "4", 0), (other, "8", 2)):
        shutil.rmtree(data, ignore_errors=True)
        prepare = ["data", "prepare", "--corpus", str(text), "--tokenizer-path", str(tokenizer_folder)]
        assert main([*prepare, "--output", str(data)]) == 0
        assert main([*run, "--max-steps", steps]) == exit_code
    assert "was trained on other token shards" in capsys.readouterr().err


def test_gradient_accumulation_gives_the_same_losses(corpus, tmp_path):
    for name, more in (("one_pass", []), ("accumulated", ["--training.device_batch_size", "2"])):
        run = [*arguments(tmp_path / name, corpus, *more), "--model.overrides.hidden_dropout", "0.0"]
        assert main(run) == 0
    one_pass, accumulated = losses(tmp_path / "one_pass"), losses(tmp_path / "accumulated")
    assert list(one_pass.values()) == pytest.approx(list(accumulated.values()), rel=1e-5)
    assert one_pass != {}


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(corpus, tmp_path, monkeypatch, capsys):
    from scratch_gpt.training import checkpoint

    save = checkpoint.save_file

    def full_disk(tensors, file):
        if "checkpoint-8" in str(file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(file))
        save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, corpus)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "earlier checkpoints are untouched" in error
    assert [path.name for path in run_dir.glob("*checkpoint-*")] == ["checkpoint-4"]
    assert find_checkpoint(run_dir)[0].name == "checkpoint-4"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.num_attention_heads", "5"], "--model: "),
        (["--model.preset", "gpt3"], "no preset 'gpt3'"),
        (["--model.overrides.norm_typ", "layernorm"], "no field norm_typ"),
        (["--training.total_batch_size", "100"], "must be a multiple of 32"),
        (["--training.device_batch_size", "3"], "must divide the 8 sequences"),
        (["--training.context_length", "100000", "--training.total_batch_size", "100000"], "has only .* tokens"),
        (["--tokenizer.vocab_size", "90000"], "the corpus supports only"),
        (["--data-path", "absent", "--tokenizer-path", "TOKENIZER"], "holds no manifest.json"),
        (["--max-steps", "0"], "--max_steps is 0; it must be more than 0"),
        (["--training.learning_rate", "-1"], "--training.learning_rate is -1"),
    ],
)
def test_bad_settings_are_refused_with_one_message(more, message, corpus, tokenizer_folder, tmp_path, capsys):
    more = [str(tokenizer_folder) if word == "TOKENIZER" else word for word in more]
    assert main(arguments(tmp_path / "run", corpus, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    # nothing was trained, so the corrected command may use the same directory
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_corrected_command_may_use_the_same_directory(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, corpus, "--training.total_batch_size", "100")) == 2
    assert main([*arguments(run_dir, corpus), "--max-steps", "2"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word " * 3, "no text is left for the validation split"),
        ("some words that differ. " * 20, "the training text has only .* tokens, one sequence takes 33"),
        ("", "empty; provide a file that holds text"),
        ("   \n \n", "no text is left for the train split"),
    ],
)
def test_too_little_text_is_refused(text, message, tokenizer_folder, tmp_path, capsys):
    corpus = tmp_path / "text.txt"
    corpus.write_text(text)
    run = arguments(tmp_path / "run", corpus, "--tokenizer-path", str(tokenizer_folder))
    if "differ" in text:
        run += ["--training.context_length", "256"]
    assert main(run) == 2
    assert re.search(message.replace("33", "257"), capsys.readouterr().err)


def test_another_runs_directory_is_refused_until_fresh(finished, corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    other = [*arguments(run_dir, corpus), "--training.learning_rate", "0.001", "--max-steps", "2"]
    assert main(other) == 2
    error = capsys.readouterr().err
    assert "training.learning_rate is 0.004 there and 0.001 here" in error or "training.learning_rate" in error
    assert_same_run(run_dir, finished)
    assert main([*other, "--fresh"]) == 0
    assert max(losses(run_dir)) == 2


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_directory_with_other_files_is_refused(fresh, corpus, tmp_path, capsys):
    (tmp_path / "thesis.doc").write_text("years of work")
    assert main([*arguments(tmp_path, corpus), *fresh]) == 2
    assert "holds files that are not a run's" in capsys.readouterr().err
    assert (tmp_path / "thesis.doc").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_two_processes_cannot_write_the_same_run(corpus, tmp_path, capsys):
    from scratch_gpt.config import PretrainSettings
    from scratch_gpt.training.run_directory import run_directory

    with run_directory(PretrainSettings(run_dir=str(tmp_path / "run"))):
        assert main(arguments(tmp_path / "run", corpus)) == 2
    assert "another process is writing" in capsys.readouterr().err
