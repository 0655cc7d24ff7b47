"""Settings that have another name today. An old name is refused, naming the new one; an old run directory still resumes."""

from fnmatch import fnmatchcase
from typing import Any

from scratch_gpt.config.fields import find_setting

RENAMED = {
    "resume_from": "init_from",
    "resume_optimizer": "init_optimizer",
    "errors": "encoding_errors",
    "on_error": "on_bad_record",
    "sources.*.configuration": "sources.*.subset",
    "tokenizer.words": "tokenizer.split_pattern",
    "tokenizer.digits": "tokenizer.max_digits",
    "training.final_learning_rate": "training.min_lr_ratio",
    "guard.rollback_learning_rate": "guard.rollback_lr_factor",
    "ppo.mini_batches": "ppo.num_mini_batches",
    "ppo.epochs": "ppo.num_ppo_epochs",
    "flops": "peak_flops",
    "limit_rows": "max_batch_size",
    "limit_memory": "max_memory",
}
"""Old name: new name. ``*`` stands for a name that the user chose."""


def current_name(name: str) -> str:
    """The name today of a setting that was called ``name``; ``name`` itself if it was not renamed."""
    for old, new in RENAMED.items():
        if fnmatchcase(name, old):
            return _fill(name, old, new)
    return name


def renamed_to(settings_class: Any, name: str) -> str | None:
    """The new name of a setting of ``settings_class`` that used to be called ``name``; None for any other name."""
    new = current_name(name.replace("-", "_"))
    return new if new != name and find_setting(settings_class, new) else None


def _fill(name: str, old: str, new: str) -> str:
    """Put what ``*`` stands for in ``name`` into ``new``."""
    if "*" not in old:
        return new
    before, after = old.split("*")
    return new.replace("*", name[len(before) : len(name) - len(after)])
