import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scratch_gpt.cli import COMMANDS, main
from scratch_gpt.config import PretrainSettings, QuickstartSettings, flatten, parse_settings, save_settings
from scratch_gpt.errors import UserError


def parse(*arguments):
    return parse_settings(PretrainSettings, arguments, "scratch-gpt pretrain")


@pytest.mark.parametrize("verb", ["", *COMMANDS])
def test_help_imports_neither_torch_nor_transformers(verb):
    command = Path(sys.executable).with_name("scratch-gpt")
    for start in ([str(command)], ["-m", "scratch_gpt"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *start, *verb.split(), "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "--config" in done.stdout
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
        assert "scratch_gpt.config" in imported
        assert not {"torch", "transformers", "tokenizers", "numpy"} & imported


def test_command_line_wins_over_file_wins_over_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 5\ntraining: {learning_rate: 0.001, warmup_steps: 7}\n")
    settings = parse("--config", str(file), "--training.learning-rate", "0.002")
    assert (settings.seed, settings.training.warmup_steps, settings.training.learning_rate) == (5, 7, 0.002)
    assert settings.training.weight_decay == PretrainSettings().training.weight_decay


def test_saved_settings_read_back_equal(tmp_path):
    settings = parse("--run-dir", "x", "--fresh", "--model.overrides.norm_type", "layernorm", "--max-steps", "3")
    save_settings(settings, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == settings
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["overrides"] == {"norm_type": "layernorm"}
    assert flatten(settings)["model.overrides.norm_type"] == "layernorm"


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["--training.learning_rte", "1"], "training.learning_rate"),
        (["--max-stepps", "1"], "max_steps"),
        (["--config", "group.yaml"], "training.learning_rate"),
        (["--config", "section.yaml"], "training.learning_rate"),
    ],
)
def test_unknown_setting_is_refused_with_the_nearest_name(arguments, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "group.yaml").write_text("training: {learning_rte: 1}")
    (tmp_path / "section.yaml").write_text("trainin: {learning_rate: 1}")
    with pytest.raises(UserError, match=f"Did you mean '{nearest}'"):
        parse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", "many"], "--max_steps: Expected a .*int"),
        (["--training.schedule", "sometimes"], "cosine"),
        (["--config", "absent.yaml"], "does not exist"),
        (["--max-steps"], "expected one argument"),
        (["stray"], "unknown setting 'stray'"),
    ],
)
def test_wrong_value_is_one_clear_message(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


def test_optional_number_says_what_it_expects():
    with pytest.raises(UserError, match=r"^--max_steps: Expected a int. Got value: 3.5"):
        parse_settings(QuickstartSettings, ["--max-steps", "3.5"], "scratch-gpt quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "Did you mean 'pretrain'"),
        (["data"], "scratch-gpt data prepare, scratch-gpt data inspect"),
        (["pretrain", "--corpus", "absent.txt"], "there is no text file absent.txt"),
    ],
)
def test_a_mistake_exits_with_2_and_no_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_overview_names_every_verb(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in COMMANDS)


@pytest.mark.parametrize("order", ["scratch_gpt transformers", "transformers scratch_gpt"])
def test_importing_the_package_registers_the_auto_classes(order):
    first, second = order.split()
    code = (
        f"import {first}, {second}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification\n"
        "config = AutoConfig.for_model('scratch_gpt', vocab_size=64, hidden_size=16, num_hidden_layers=1,"
        " num_attention_heads=2)\n"
        "for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):\n"
        "    assert type(auto.from_config(config)).__name__.startswith('ScratchGPTFor')\n"
        "assert type(AutoModelForCausalLM.from_config(config)) is scratch_gpt.ScratchGPTForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
