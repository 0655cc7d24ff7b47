"""The plan of a preparation: its work units, and everything that the result depends on."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scratch_gpt.data.inputs import Dataset, FileSlice, Location, cut
from scratch_gpt.data.sources import Source, Split, find_files, text_digest
from scratch_gpt.errors import UserError
from scratch_gpt.files import sha256

UNITS_PER_SOURCE = 256
"""Maximum number of units per source; a source with more text gets larger units."""


@dataclass(frozen=True)
class WorkUnit:
    """The slices that one process tokenizes at a time. ``split`` is used only if entire files are held out."""

    source: str
    number: int
    split: Split
    slices: tuple[FileSlice, ...]

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:05d}"

    def as_json(self) -> list[Any]:
        slices = [[_location_name(file_slice.location), file_slice.start, file_slice.end] for file_slice in self.slices]
        return [self.name, self.split, slices]


def plan_units(source: Source, unit_bytes: int) -> list[WorkUnit]:
    """Cut a source into units of at least ``unit_bytes`` bytes of its files, in the order of its text."""
    units: list[WorkUnit] = []
    by_split: dict[Split, tuple[Location, ...]] = {"train": source.locations, "validation": source.validation_locations}
    for split, locations in by_split.items():
        size = max(unit_bytes, sum(_size(location) for location in locations) // UNITS_PER_SOURCE)
        slices: list[FileSlice] = []
        filled = 0

        def close(split: Split, slices: list[FileSlice]) -> None:
            if slices:
                units.append(WorkUnit(source.name, len(units), split, tuple(slices)))

        for location in locations:
            for file_slice, num_bytes in cut(location, size):
                slices.append(file_slice)
                filled += num_bytes
                if filled >= size:
                    close(split, slices)
                    slices, filled = [], 0
        close(split, slices)
    return units


def _size(location: Location) -> int:
    return 0 if isinstance(location, Dataset) else location.stat().st_size


def _location_name(location: Location) -> str:
    return location.path if isinstance(location, Dataset) else location.name


def describe(sources: Iterable[Source], deduplicate: bool, decontaminate: Sequence[str]) -> dict[str, Any]:
    """Describe what each source's shards depend on, except the tokenizer."""
    against = [sha256(file) for name in decontaminate for file in find_files(name)]
    descriptions = {}
    for source in sources:
        options = {
            "column": source.read_options.column,
            "template": source.read_options.template,
            "errors": source.read_options.errors,
            "validation_fraction": source.validation_fraction,
            "deduplicate": deduplicate,
            "decontaminate": against,
        }
        text = hashlib.sha256(json.dumps([text_digest(source), options]).encode()).hexdigest()
        descriptions[source.name] = {
            "source": source.origin,
            "text": text,
            "held_out": source.split_description,
            "options": options,
        }
    return descriptions


def same_as(existing: dict[str, Any], wanted: dict[str, Any], output: Path, what: str = "shards") -> dict[str, Any]:
    """Return ``existing`` if it was made from what ``wanted`` describes.

    Raises:
        UserError: it was made from something else; names the differences.
    """
    changed = [] if list(existing["sources"]) == list(wanted["sources"]) else ["list of sources"]
    for name in existing["sources"].keys() & wanted["sources"].keys():
        old, new = existing["sources"][name], wanted["sources"][name]
        differs = [key for key in ("source", "text") if old[key] != new[key]]
        options = [key for key in new["options"] if old.get("options", {}).get(key) != new["options"][key]]
        changed += [key for key in differs if key != "text"] + (options or [key for key in differs if key == "text"])
    changed += [
        key
        for key in ("tokenizer", "units", "tokens_per_shard")
        if existing.get(key) != wanted.get(key, existing.get(key))
    ]
    if changed:
        raise UserError(
            f"{output} holds {what} with a different {' and '.join(dict.fromkeys(changed))}: choose another folder or "
            "delete it"
        )
    return existing
