"""Which settings a run directory compares with those of a command that wants to resume it."""

from pathlib import Path

import pytest
import yaml

from scratch_gpt.config import ModelSettings, PretrainSettings, TrainingSettings, save_settings
from scratch_gpt.errors import UserError
from scratch_gpt.training.run_directory import run_directory, stored_settings


@pytest.fixture
def trained(tmp_path):
    """A run directory with a checkpoint, and settings under the names that they had before they were renamed."""
    settings = PretrainSettings(run_dir=str(tmp_path / "run"), training=TrainingSettings(min_lr_ratio=0.1))
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint-1").mkdir(parents=True)
    save_settings(settings, run_dir / "config.yaml")
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())
    stored["resume_from"] = stored.pop("init_from")
    stored["resume_optimizer"] = stored.pop("init_optimizer")
    stored["errors"], stored["on_error"] = stored.pop("encoding_errors"), stored.pop("on_bad_record")
    stored["training"]["final_learning_rate"] = stored["training"].pop("min_lr_ratio")
    stored["guard"]["rollback_learning_rate"] = stored["guard"].pop("rollback_lr_factor")
    stored["tokenizer"]["words"] = stored["tokenizer"].pop("split_pattern")
    stored["tokenizer"]["digits"] = stored["tokenizer"].pop("max_digits")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(stored))
    return settings


def resume(settings):
    with run_directory(settings) as run_dir:
        assert (run_dir / "checkpoint-1").is_dir()


def test_a_run_from_before_settings_were_renamed_resumes(trained):
    resume(trained)
    stored = stored_settings(Path(trained.run_dir))
    assert stored["training.min_lr_ratio"] == 0.1 and "training.final_learning_rate" not in stored


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("training", "min_lr_ratio", 0.2, "training.min_lr_ratio is 0.1 there and 0.2 here"),
        ("guard", "rollback_lr_factor", 0.5, "guard.rollback_lr_factor is 1.0 there and 0.5 here"),
        ("tokenizer", "max_digits", 1, "tokenizer.max_digits is 3 there and 1 here"),
        ("tokenizer", "split_pattern", "gpt2", "tokenizer.split_pattern is 'gpt4' there and 'gpt2' here"),
        (None, "encoding_errors", "replace", "encoding_errors is 'strict' there and 'replace' here"),
        (None, "init_from", "x", "init_from is None there and 'x' here"),
    ],
)
def test_it_is_refused_with_another_value_under_the_new_name(trained, section, name, value, message):
    setattr(getattr(trained, section) if section else trained, name, value)
    with pytest.raises(UserError, match=message):
        resume(trained)


def test_settings_that_may_change_do_not_hinder(trained):
    trained.max_steps, trained.training.save_every, trained.parallel.timeout = 7, 3, 9.0
    resume(trained)


@pytest.mark.parametrize("stored", [True, False])
def test_a_key_of_the_users_that_only_one_of_them_has_counts(trained, stored):
    other = PretrainSettings(
        run_dir=trained.run_dir, training=trained.training, model=ModelSettings(overrides={"norm_type": "layernorm"})
    )
    if stored:
        save_settings(other, Path(trained.run_dir) / "config.yaml")
    with pytest.raises(UserError, match="model.overrides.norm_type is"):
        resume(trained if stored else other)
