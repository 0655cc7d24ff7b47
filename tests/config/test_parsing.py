"""Settings from defaults, a file and the command line, and the messages for mistakes in them."""

import re

import pytest
import yaml

from scratch_gpt.config import (
    DatatroveExportSettings,
    GenerateSettings,
    PretrainSettings,
    QuickstartSettings,
    flatten,
    parse_settings,
    save_settings,
)
from scratch_gpt.errors import UserError


def parse(*arguments):
    return parse_settings(PretrainSettings, arguments, "scratch-gpt pretrain")


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
        (["--max-steps", "many"], "--max_steps is 'many'; it must be a whole number"),
        (["--training.schedule", "sometimes"], "cosine"),
        (["--config", "absent.yaml"], "does not exist"),
        (["--max-steps"], "--max_steps expects a value"),
        (["stray"], "unknown setting 'stray'"),
    ],
)
def test_wrong_value_is_one_clear_message(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


def test_optional_number_says_what_it_expects():
    with pytest.raises(UserError, match=r"^--max_steps is '3.5'; it must be a whole number\n"):
        parse_settings(QuickstartSettings, ["--max-steps", "3.5"], "scratch-gpt quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fresh", "maybe"], "--fresh is 'maybe'; it must be true or false"),
        (["--training.mixture", "[1]"], "--training.mixture is '[1]'; it must be a mapping, each value a number"),
        (["--model.hidden_size", "3.5"], "--model.hidden_size is '3.5'; it must be a whole number"),
        (["--training.schedule", "often"], "it must be one of wsd, cosine, linear, constant"),
        (["--training.phases", "[{name: a, shar: 1}]"], "a mapping with the fields name, share, mixture"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_setting_and_what_it_takes(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*arguments)


def test_all_wrong_values_are_in_one_message(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: many\ntraining: {learning_rate: high, warmup_steps: 3}\n")
    with pytest.raises(UserError) as refused:
        parse("--config", str(tmp_path / "run.yaml"), "--max-steps", "few")
    for name in ("--seed is 'many'", "--training.learning_rate is 'high'", "--max_steps is 'few'"):
        assert name in str(refused.value)
    assert "warmup_steps" not in str(refused.value)


def test_all_unknown_names_are_in_one_message():
    with pytest.raises(UserError, match=r"(?s)'max_stepps'.*'training.learning_rte'"):
        parse("--max-stepps", "1", "--training.learning_rte", "1")


def test_all_numbers_out_of_range_are_in_one_message():
    words = ["--max-steps", "0", "--training.beta1", "1", "--training.weight_decay", "-1", "--guard.window", "0"]
    with pytest.raises(UserError) as refused:
        parse(*words)
    assert str(refused.value).splitlines() == [
        "--max_steps is 0; it must be more than 0",
        "--training.weight_decay is -1.0; it must be at least 0",
        "--training.beta1 is 1.0; it must be below 1",
        "--guard.window is 0; it must be more than 0",
    ]


def test_keys_that_the_user_chooses_have_no_limits():
    assert parse("--model.overrides.seed", "-1").model.overrides == {"seed": -1}


def test_a_missing_setting_is_named():
    with pytest.raises(UserError, match="--output is required"):
        parse_settings(DatatroveExportSettings, [], "scratch-gpt data export-datatrove")


def test_the_first_word_may_be_the_positional_setting():
    assert parse_settings(GenerateSettings, ["my/model", "--top-k", "1"], "scratch-gpt generate").model == "my/model"


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    for content in ("a: [1", "just words"):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(UserError, match="--config: .*run.yaml"):
            parse("--config", str(tmp_path / "run.yaml"))


def test_print_config_prints_a_file_that_can_be_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--seed", "5", "--print-config")
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "run.yaml")).seed == 5
