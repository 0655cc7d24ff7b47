"""A setting's old name is refused, naming the new one."""

import pytest
import yaml

from scratch_gpt import config
from scratch_gpt.cli import main
from scratch_gpt.config import RENAMED, current_name

OLD_AND_NEW = [
    ("pretrain", "resume_from", "init_from", "x"),
    ("pretrain", "resume_optimizer", "init_optimizer", True),
    ("pretrain", "errors", "encoding_errors", "strict"),
    ("data prepare", "on_error", "on_bad_record", "stop"),
    ("evaluate", "errors", "encoding_errors", "strict"),
    ("data prepare", "sources.novels.configuration", "sources.novels.subset", "en"),
    ("tokenizer train", "tokenizer.words", "tokenizer.split_pattern", "gpt4"),
    ("quickstart", "tokenizer.digits", "tokenizer.max_digits", 3),
    ("pretrain", "training.final_learning_rate", "training.min_lr_ratio", 0.1),
    ("pretrain", "guard.rollback_learning_rate", "guard.rollback_lr_factor", 0.5),
    ("ppo", "ppo.mini_batches", "ppo.num_mini_batches", 2),
    ("ppo", "ppo.epochs", "ppo.num_ppo_epochs", 2),
    ("plan", "flops", "peak_flops", 1e12),
    ("find-batch-size", "limit_rows", "max_batch_size", 2),
    ("find-batch-size", "limit_memory", "max_memory", "1GB"),
]


def test_every_renamed_setting_is_tested():
    assert {current_name(old) for _, old, _, _ in OLD_AND_NEW} == {
        new.replace("*", "novels") for new in RENAMED.values()
    }


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("spelling", ["underscores", "dashes", "file"])
@pytest.mark.parametrize(("command", "old", "new", "value"), OLD_AND_NEW)
def test_an_old_name_is_refused_with_the_new_one(command, old, new, value, spelling, tmp_path, capsys):
    words = [f"--{old.replace('_', '-') if spelling == 'dashes' else old}", str(value)]
    if spelling == "file":
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(nested(old, value)))
        words = ["--config", str(tmp_path / "old.yaml")]
    assert main([*command.split(), *words]) == 2
    assert f"the setting {old!r} is called {new!r} now" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "old", "new", "value"), OLD_AND_NEW)
def test_the_new_name_is_taken(command, old, new, value, tmp_path):
    from scratch_gpt.cli import COMMANDS

    (tmp_path / "new.yaml").write_text(yaml.safe_dump(nested(new, value)))
    settings = config.parse_settings(COMMANDS[command][0], ["--config", str(tmp_path / "new.yaml")], command)
    assert config.flatten(settings)[new] == value
