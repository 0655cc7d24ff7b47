"""One place per setting: its default, its limits, and what a resumed run and a tracker may do with it."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Any


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    more_than: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    may_change: bool = False,
    tracked: bool | None = None,
    common: bool = False,
) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        more_than, at_least, below: Limits of a number. A value of None is always within them.
        may_change: A run may be resumed with another value.
        common: Listed first by ``--help``.
        tracked: Sent to trackers. Default: as the section that the field is in; outside of sections, not sent.
    """
    metadata = {"more_than": more_than, "at_least": at_least, "below": below}
    metadata |= {"may_change": may_change, "tracked": tracked, "common": common}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SettingInfo:
    """Description of one setting, under its name on the command line."""

    name: str
    type: Any
    is_section: bool = False
    more_than: float | None = None
    at_least: float | None = None
    below: float | None = None
    may_change: bool = False
    tracked: bool = False

    @property
    def has_user_keys(self) -> bool:
        """Whether the value is a mapping from names that the user chooses to plain values."""
        return typing.get_origin(self.type) is dict and self.item_class is None

    @property
    def item_class(self) -> Any:
        """The settings dataclass of each item of a dict or list; None for any other type."""
        if typing.get_origin(self.type) in (dict, list):
            item = typing.get_args(self.type)[-1]
            return item if dataclasses.is_dataclass(item) else None
        return None

    def problem_with(self, value: Any) -> str | None:
        """The limit that a number exceeds, in words; None for a number within its limits and for any other value."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.more_than is not None and not value > self.more_than:
            return f"it must be more than {self.more_than}"
        if self.at_least is not None and not value >= self.at_least:
            return f"it must be at least {self.at_least}"
        if self.below is not None and not value < self.below:
            return f"it must be below {self.below}"
        return None


@cache
def all_settings(settings_class: Any) -> dict[str, SettingInfo]:
    """Every setting of a settings dataclass by its full name, sections included: ``{"training.learning_rate": ...}``."""
    return {info.name: info for info in _walk(settings_class, "", tracked=False)}


def _walk(settings_class: Any, prefix: str, tracked: bool) -> Iterator[SettingInfo]:
    for f in dataclasses.fields(settings_class):
        metadata = dict(f.metadata)
        own = metadata.pop("tracked", None)
        metadata.pop("common", None)
        is_tracked = tracked if own is None else own
        is_section = dataclasses.is_dataclass(f.type)
        yield SettingInfo(prefix + f.name, f.type, is_section, tracked=is_tracked, **metadata)
        if is_section:
            yield from _walk(f.type, f"{prefix}{f.name}.", is_tracked)


def find_setting(settings_class: Any, name: str) -> SettingInfo | None:
    """The setting called ``name``, or the one that holds it as a key of the user's, as in ``training.mixture.stories``.

    A name below ``dict[str, SourceSettings]`` must be one of that class: ``sources.NAME.path``.
    """
    known = all_settings(settings_class)
    if name in known:
        return known[name]
    for holder in known.values():
        rest = name.removeprefix(f"{holder.name}.")
        if rest == name or typing.get_origin(holder.type) is not dict:
            continue
        if holder.has_user_keys:
            return holder
        _, _, inner = rest.partition(".")
        if not inner or find_setting(holder.item_class, inner):
            return holder
    return None
