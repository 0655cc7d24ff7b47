"""The plan of a preparation: which text makes which unit of work, and what the result depends on."""

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
"""A source with more text than so many of the smallest units is cut into larger ones."""


@dataclass(frozen=True)
class WorkUnit:
    """What one process does at a time. ``split``: which one its text belongs to, where whole files are held out."""

    source: str
    number: int
    split: Split
    pieces: tuple[FileSlice, ...]

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:05d}"

    def as_json(self) -> list[Any]:
        pieces = [[_place_name(piece.place), piece.start, piece.end] for piece in self.pieces]
        return [self.name, self.split, pieces]


def plan_units(source: Source, unit_bytes: int) -> list[WorkUnit]:
    """The source's units, in the order of its text."""
    units: list[WorkUnit] = []
    by_split: dict[Split, tuple[Location, ...]] = {"train": source.places, "validation": source.held_out}
    for split, places in by_split.items():
        size = max(unit_bytes, sum(_size(place) for place in places) // UNITS_PER_SOURCE)
        pieces: list[FileSlice] = []
        filled = 0

        def close(split: Split, pieces: list[FileSlice]) -> None:
            if pieces:
                units.append(WorkUnit(source.name, len(units), split, tuple(pieces)))

        for place in places:
            for piece, num_bytes in cut(place, size):
                pieces.append(piece)
                filled += num_bytes
                if filled >= size:
                    close(split, pieces)
                    pieces, filled = [], 0
        close(split, pieces)
    return units


def _size(place: Location) -> int:
    return 0 if isinstance(place, Dataset) else place.stat().st_size


def _place_name(place: Location) -> str:
    return place.path if isinstance(place, Dataset) else place.name


def describe(sources: Iterable[Source], deduplicate: bool, decontaminate: Sequence[str]) -> dict[str, Any]:
    """What each source's shards depend on, but for the tokenizer."""
    against = [sha256(file) for name in decontaminate for file in find_files(name)]
    descriptions = {}
    for source in sources:
        options = {
            "column": source.reading.column,
            "template": source.reading.template,
            "errors": source.reading.errors,
            "validation_fraction": source.validation_fraction,
            "deduplicate": deduplicate,
            "decontaminate": against,
        }
        text = hashlib.sha256(json.dumps([text_digest(source), options]).encode()).hexdigest()
        descriptions[source.name] = {
            "source": source.origin,
            "text": text,
            "held_out": source.how,
            "options": options,
        }
    return descriptions


def same_as(there: dict[str, Any], here: dict[str, Any], output: Path, what: str = "shards") -> dict[str, Any]:
    """``there``, if it was made from what ``here`` describes.

    Raises:
        UserError: it was not; says in what they differ.
    """
    changed = [] if list(there["sources"]) == list(here["sources"]) else ["list of sources"]
    for name in there["sources"].keys() & here["sources"].keys():
        old, new = there["sources"][name], here["sources"][name]
        differs = [key for key in ("source", "text") if old[key] != new[key]]
        options = [key for key in new["options"] if old.get("options", {}).get(key) != new["options"][key]]
        changed += [key for key in differs if key != "text"] + (options or [key for key in differs if key == "text"])
    changed += [
        key for key in ("tokenizer", "units", "tokens_per_shard") if there.get(key) != here.get(key, there.get(key))
    ]
    if changed:
        raise UserError(
            f"{output} holds {what} with another {' and '.join(dict.fromkeys(changed))}: choose another folder or "
            "delete it"
        )
    return there
