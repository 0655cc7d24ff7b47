"""Prepare the data of a recipe: read rows, hold some out for validation, encode them, and skip those that are too long."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scratch_gpt.alignment.data.dataset_types import FilteredRows
from scratch_gpt.alignment.data.read_rows import Row
from scratch_gpt.config import RecipeSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError


@dataclass(frozen=True)
class PreparedDataset:
    """The encoded rows of a recipe."""

    train: list[Row]
    validation: list[Row]
    is_chat: bool
    """Whether the rows are conversations; false for plain texts to continue."""
    facts: dict[str, Any]
    """For the model card: where the rows come from, and how many were skipped, by name."""


def prepare_dataset(
    settings: RecipeSettings,
    read: Callable[[str, str, str], FilteredRows],
    encode: Callable[[Row], tuple[Row, int]],
    max_length: int,
) -> PreparedDataset:
    """Read, split and encode the data of a recipe, and print how many rows there are.

    Args:
        settings: Names the data. Without ``validation_data``, some prompts are held out, chosen by the seed.
        read: Reads one of TRL's dataset types, such as :func:`~scratch_gpt.alignment.data.dataset_types.preference`.
        encode: Returns an encoded row and its length in tokens.
        max_length: Longer rows are skipped.

    Raises:
        UserError: no rows are left to train on, or to validate on.
    """
    data = read(settings.data, settings.split, settings.plain_text)
    print0(f"data       {settings.data}: {data.describe()}")
    facts: dict[str, Any] = {"data": f"`{settings.data}`, {data.describe()}"}
    if settings.validation_data is not None:
        train, validation = data.rows, read(settings.validation_data, settings.split, settings.plain_text).rows
        facts["held out from"] = f"`{settings.validation_data}`"
    else:
        train, validation = hold_out(data.rows, settings.validation_fraction, settings.seed)
    encoded: dict[str, list[Row]] = {}
    for name, rows in (("training", train), ("held out", validation)):
        rows_and_lengths = [encode(row) for row in rows]
        short_enough = [row for row, length in rows_and_lengths if length <= max_length]
        if not short_enough:
            raise UserError(
                f"{settings.data}, {name}: no row is left of {len(rows):,}, all are longer than {max_length:,} tokens"
            )
        num_skipped = len(rows) - len(short_enough)
        skipped = {f"longer than {max_length:,} tokens": num_skipped} if num_skipped else {}
        facts[name] = FilteredRows(short_enough, skipped).describe()
        print0(f"           {name}: {facts[name]}")
        encoded[name] = short_enough
    is_chat = not isinstance(data.rows[0].get("prompt"), str)
    return PreparedDataset(encoded["training"], encoded["held out"], is_chat, facts)


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split ``rows`` into training and held-out rows: all rows of a random ``fraction`` of the prompts are held out.

    Raises:
        UserError: the fraction is less than one prompt, or all of them.
    """
    prompts = [json.dumps(row.get("prompt", row.get("messages"))) for row in rows]
    distinct = list(dict.fromkeys(prompts))
    count = round(fraction * len(distinct))
    if not 0 < count < len(distinct):
        raise UserError(
            f"--validation-fraction {fraction} holds out {count} of {len(distinct)} prompts: change it, give more rows, or "
            "give --validation-data"
        )
    held_out = set(random.Random(seed).sample(distinct, count))
    rows_and_prompts = list(zip(rows, prompts, strict=True))
    return (
        [row for row, prompt in rows_and_prompts if prompt not in held_out],
        [row for row, prompt in rows_and_prompts if prompt in held_out],
    )
