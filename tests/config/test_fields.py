"""Limits, the resume rule and what trackers get, as the fields of the settings declare them."""

import dataclasses

import pytest

from scratch_gpt.cli import COMMANDS
from scratch_gpt.config import PretrainSettings, QuickstartSettings, all_settings, find_setting
from scratch_gpt.config.help import field_docs

MORE_THAN_ZERO = {
    "activation_checkpointing_every",
    "batch_size",
    "benchmark_every",
    "benchmark_limit",
    "context_length",
    "device_batch_size",
    "devices",
    "devices_per_node",
    "eval_every",
    "hidden_size",
    "intermediate_size",
    "keep_every",
    "keep_last",
    "learning_rate",
    "limit",
    "log_every",
    "lora_rank",
    "max_batch_size",
    "max_characters",
    "max_completion_length",
    "max_document_characters",
    "max_grad_norm",
    "max_hours",
    "max_length",
    "max_new_tokens",
    "max_position_embeddings",
    "max_rollbacks",
    "max_skips",
    "max_steps",
    "memory_snapshot_step",
    "mfu",
    "mini_batch_size",
    "minutes",
    "num_attention_heads",
    "num_hidden_layers",
    "num_iterations",
    "num_key_value_heads",
    "num_mini_batches",
    "num_ppo_epochs",
    "num_return_sequences",
    "peak_flops",
    "pipeline",
    "pipeline_microbatches",
    "price",
    "rollback_lr_factor",
    "sample_every",
    "save_every",
    "tokens",
    "total_batch_size",
    "validation_fraction",
    "value_learning_rate",
    "window",
    "workers",
}
AT_LEAST_ZERO = {
    "batch_warmup_steps",
    "beta",
    "beta1",
    "beta2",
    "decay_fraction",
    "min_lr_ratio",
    "muon_momentum",
    "rows",
    "seed",
    "sigmas",
    "temperature",
    "top_k",
    "warmup_steps",
    "weight_decay",
}
BELOW_ONE = {"beta1", "beta2", "mfu", "muon_momentum", "validation_fraction"}
MAY_CHANGE = {
    "run_dir",
    "fresh",
    "max_steps",
    "minutes",
    "dry_run",
    "max_hours",
    "training.total_batch_size",
    "training.device_batch_size",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.keep_last",
    "training.keep_every",
    "training.async_save",
    "training.trackers",
    "training.sample_every",
    "training.sample_prompts",
    "training.benchmark_every",
    "training.benchmark_tasks",
    "training.benchmark_path",
    "training.benchmark_limit",
    "training.profile_steps",
    "training.memory_snapshot_step",
    "parallel.pipeline",
    "parallel.pipeline_schedule",
    "parallel.pipeline_microbatches",
    "parallel.timeout",
}
RECIPES = ("sft", "reward", "dpo", "kto", "grpo", "rloo", "ppo")
EVERY_COMMAND = pytest.mark.parametrize("command", COMMANDS)


def settings_of(command):
    return {name: info for name, info in all_settings(COMMANDS[command][0]).items() if not info.is_section}


@EVERY_COMMAND
def test_every_number_has_its_limits(command):
    """An inherited field that is declared again with another default keeps its limits."""
    for name, info in settings_of(command).items():
        last = name.rsplit(".", 1)[-1]
        assert info.more_than == (0 if last in MORE_THAN_ZERO else None), name
        assert info.at_least == (2 if last == "num_generations" else 0 if last in AT_LEAST_ZERO else None), name
        assert info.below == (1 if last in BELOW_ONE else None), name


@pytest.mark.parametrize("command", ["pretrain", "quickstart"])
def test_what_may_change_when_pretraining_resumes(command):
    changing = {name for name, info in settings_of(command).items() if info.may_change}
    assert changing == (MAY_CHANGE if command == "quickstart" else MAY_CHANGE - {"minutes"})


@pytest.mark.parametrize("command", RECIPES)
def test_what_may_change_when_an_alignment_recipe_resumes(command):
    changing = {name for name, info in settings_of(command).items() if info.may_change}
    expected = {f"{command}.{name}" for name in ("save_every", "keep_last", "eval_every", "log_every")}
    expected |= {"run_dir", "fresh", "max_steps", "max_hours", "trackers"}
    assert changing == expected - {"ppo.log_every"}


@pytest.mark.parametrize("settings_class", [PretrainSettings, QuickstartSettings])
def test_trackers_get_numbers_but_no_paths(settings_class):
    tracked = {name for name, info in all_settings(settings_class).items() if info.tracked and not info.is_section}
    sections = ("model.", "training.", "tokenizer.", "guard.")
    expected = {name for name in all_settings(settings_class) if name.startswith(sections)}
    assert tracked == expected - {"training.benchmark_path"} | {"max_steps", "seed"}


@EVERY_COMMAND
def test_every_setting_has_a_help_text(command):
    classes = [COMMANDS[command][0]]
    for settings_class in classes:
        for f in dataclasses.fields(settings_class):
            if dataclasses.is_dataclass(f.type):
                classes.append(f.type)
                assert f.type.__doc__
            else:
                assert field_docs(settings_class).get(f.name, "").endswith((".", ")")), f"{settings_class}.{f.name}"
        classes += [info.item_class for info in all_settings(settings_class).values() if info.item_class]


@pytest.mark.parametrize(
    ("name", "holder"),
    [
        ("training.learning_rate", "training.learning_rate"),
        ("training.mixture.stories", "training.mixture"),
        ("model.overrides.norm_type", "model.overrides"),
        ("sources.novels.path", "sources"),
        ("sources.novels.pth", None),
        ("training.learning_rte", None),
    ],
)
def test_find_setting(name, holder):
    found = find_setting(PretrainSettings, name)
    assert (found and found.name) == holder
