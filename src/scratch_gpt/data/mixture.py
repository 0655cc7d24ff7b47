"""Mixtures: which source each row of a run comes from, and how far each source has been read.

Weights are shares of the *tokens*. Rows are dealt out so that after any number of rows each source is within one row of
its share (of up to four sources; within one and a half of up to eight), and exactly at it where its share is a whole
number. Nothing is drawn at random and nothing but a few integers is kept, so any row of a run of any length is found at
once, and it is the same row for any number of processes and any batch size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

from scratch_gpt.config import PhaseSettings
from scratch_gpt.data.packing import Packing
from scratch_gpt.errors import UserError


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in its data."""

    row: int = 0
    """Rows consumed by all processes since the start of the run."""
    phase: str = ""
    """Name of the phase."""
    phase_row: int = 0
    """The row at which the phase began."""
    taken: dict[str, int] = field(default_factory=dict)
    """Rows of each source that were consumed before the phase began."""


@dataclass(frozen=True)
class _Node:
    """A source, or two groups of sources that share its rows."""

    weight: int
    source: str = ""
    children: "tuple[_Node, _Node] | None" = None


class Mixture:
    """Deals rows out to sources in the proportion of ``weights`` (source to any positive number).

    A binary tree: each node gives its left side the rounded share of the rows that it gets itself. Rounding adds at
    most half a row, and passes on less than what was inherited; so one level is within 1/2 and two are within 1.
    """

    def __init__(self, weights: Mapping[str, Fraction]):
        scale = lcm(*(weight.denominator for weight in weights.values()))
        leaves = [_Node(int(weight * scale), source) for source, weight in weights.items() if weight > 0]
        self._root = _halve(sorted(leaves, key=lambda leaf: (-leaf.weight, leaf.source)))
        self.shares = {leaf.source: Fraction(leaf.weight, self._root.weight) for leaf in leaves}

    def locate(self, row: int) -> tuple[str, int]:
        """(source of row ``row``, how many rows of that source come before it)."""
        node = self._root
        while node.children is not None:
            left, right = node.children
            before, after = (_rounded_share(n, left.weight, node.weight) for n in (row, row + 1))
            node, row = (left, before) if after > before else (right, row - before)
        return node.source, row

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first ``rows`` rows come from each source."""
        counts: dict[str, int] = {}

        def deal(node: _Node, rows: int) -> None:
            if node.children is None:
                counts[node.source] = rows
                return
            left, right = node.children
            share = _rounded_share(rows, left.weight, node.weight)
            deal(left, share)
            deal(right, rows - share)

        deal(self._root, rows)
        return counts


def _halve(leaves: Sequence[_Node]) -> _Node:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return _Node(sum(leaf.weight for leaf in leaves), children=(_halve(leaves[:half]), _halve(leaves[half:])))


def _rounded_share(rows: int, part: int, whole: int) -> int:
    return (2 * rows * part + whole) // (2 * whole)


class DataOrder:
    """The rows of a run: phase after phase, each a mixture of sources; every source goes on where it was left.

    Without weights the sources are mixed in proportion to their sizes: each is read once per epoch.

    Raises:
        UserError: a mixture names a source that is not there, or gives no source a weight; shares that do not add up.
    """

    def __init__(self, packings: Mapping[str, Packing], phases: Sequence[PhaseSettings]):
        self.packings, self.phases = dict(packings), list(phases)
        _check_phases(self.phases, list(packings))
        self.mixtures = {phase.name: Mixture(self._row_weights(phase.mixture)) for phase in phases}

    def _row_weights(self, weights: Mapping[str, float]) -> dict[str, Fraction]:
        """Shares of the rows that give these shares of the tokens: packings differ in their padding."""
        return {
            name: (Fraction(repr(weights.get(name, 0))) if weights else packing.num_tokens)
            * Fraction(packing.rows_per_epoch, packing.num_tokens)
            for name, packing in self.packings.items()
        }

    def at_step(self, cursor: DataPosition, step: int, max_steps: int) -> DataPosition:
        """``cursor``, in the phase that ``step`` belongs to."""
        phase = self.phases[phase_at(step, max_steps, self.phases)].name
        return cursor if phase == cursor.phase else DataPosition(cursor.row, phase, cursor.row, self.taken(cursor))

    def locate(self, cursor: DataPosition, row: int) -> tuple[str, int]:
        """(source, row of that source) of the run's row ``row``, which lies in the cursor's phase."""
        source, index = self.mixtures[cursor.phase].locate(row - cursor.phase_row)
        return source, cursor.taken.get(source, 0) + index

    def taken(self, cursor: DataPosition) -> dict[str, int]:
        """Rows of each source consumed so far."""
        in_phase = self.mixtures[cursor.phase].counts(cursor.row - cursor.phase_row) if cursor.phase else {}
        return {name: cursor.taken.get(name, 0) + in_phase.get(name, 0) for name in self.packings}

    def epochs(self, cursor: DataPosition) -> dict[str, float]:
        """How often each source was read."""
        return {name: rows / self.packings[name].rows_per_epoch for name, rows in self.taken(cursor).items()}


def phase_at(step: int, max_steps: int, phases: Sequence[PhaseSettings]) -> int:
    """Which phase optimizer step ``step`` (from 0) belongs to."""
    end = 0.0
    for number, phase in enumerate(phases[:-1]):
        end += phase.share
        if step < round(end * max_steps):
            return number
    return len(phases) - 1


def _check_phases(phases: Sequence[PhaseSettings], sources: Sequence[str]) -> None:
    problems = []
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names) or "" in names:
        problems.append(f"--training.phases: each needs a name of its own; these are {names}")
    if abs(sum(phase.share for phase in phases) - 1) > 1e-6 or min(phase.share for phase in phases) <= 0:
        problems.append(
            f"--training.phases: the shares are {', '.join(f'{phase.share:g}' for phase in phases)}; each must be more "
            "than 0, and together they must be 1"
        )
    for phase in phases:
        unknown = sorted(set(phase.mixture) - set(sources))
        if unknown:
            problems.append(
                f"the mixture of {phase.name} names {', '.join(unknown)}; the shards hold {', '.join(sources)}"
            )
        weights = phase.mixture.values()
        if weights and not (all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0):
            problems.append(f"the mixture of {phase.name} is {phase.mixture}; weights must be 0 or more, not all 0")
    if problems:
        raise UserError("\n".join(problems))
