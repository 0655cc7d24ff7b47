"""Mixtures: which source each sequence of a run comes from, and how far each source has been read.

Weights are proportions of the *tokens*. After any number of sequences each source is within one sequence of its
proportion (with up to four sources; within one and a half with up to eight), and exact where the proportion is a whole
number of sequences. The assignment is deterministic and its state is a few integers, so any sequence of a run is
located directly, and it is the same for any world size and any batch size.
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
    """Position of a run in its data. The field names are keys in checkpoints."""

    row: int = 0
    """Sequences consumed by all ranks since the start of the run."""
    phase: str = ""
    """Name of the phase."""
    phase_row: int = 0
    """Value of ``row`` at which the phase began."""
    taken: dict[str, int] = field(default_factory=dict)
    """Sequences of each source consumed before the phase began."""


@dataclass(frozen=True)
class _Node:
    """A source, or two groups of sources between which its sequences are divided."""

    weight: int
    source: str = ""
    children: "tuple[_Node, _Node] | None" = None


class Mixture:
    """Assigns sequences to sources in proportion to ``weights`` (source to non-negative number).

    A binary tree: each node assigns its left child the rounded proportion of its own sequences. Each level adds a
    rounding error of at most 1/2 and inherits less than its parent's; so one level is within 1/2 and two are within 1.
    """

    def __init__(self, weights: Mapping[str, Fraction]):
        scale = lcm(*(weight.denominator for weight in weights.values()))
        leaves = [_Node(int(weight * scale), source) for source, weight in weights.items() if weight > 0]
        self._root = _halve(sorted(leaves, key=lambda leaf: (-leaf.weight, leaf.source)))
        self.proportions = {leaf.source: Fraction(leaf.weight, self._root.weight) for leaf in leaves}

    def locate(self, index: int) -> tuple[str, int]:
        """Return (source of sequence ``index``, number of earlier sequences of that source)."""
        node = self._root
        while node.children is not None:
            left, right = node.children
            before, after = (_rounded_proportion(n, left.weight, node.weight) for n in (index, index + 1))
            node, index = (left, before) if after > before else (right, index - before)
        return node.source, index

    def counts(self, num_sequences: int) -> dict[str, int]:
        """Return how many of the first ``num_sequences`` sequences come from each source."""
        counts: dict[str, int] = {}

        def assign(node: _Node, count: int) -> None:
            if node.children is None:
                counts[node.source] = count
                return
            left, right = node.children
            left_count = _rounded_proportion(count, left.weight, node.weight)
            assign(left, left_count)
            assign(right, count - left_count)

        assign(self._root, num_sequences)
        return counts


def _halve(leaves: Sequence[_Node]) -> _Node:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return _Node(sum(leaf.weight for leaf in leaves), children=(_halve(leaves[:half]), _halve(leaves[half:])))


def _rounded_proportion(count: int, weight: int, total: int) -> int:
    return (2 * count * weight + total) // (2 * total)


class DataOrder:
    """The sequences of a run: phase after phase, each a mixture of sources; a source continues where it stopped.

    Without weights the sources are mixed in proportion to their sizes: each is read once per epoch.

    Raises:
        UserError: a mixture names an unknown source or gives no source a weight, or the phases' shares do not sum to 1.
    """

    def __init__(self, packings: Mapping[str, Packing], phases: Sequence[PhaseSettings]):
        self.packings, self.phases = dict(packings), list(phases)
        _check_phases(self.phases, list(packings))
        self.mixtures = {phase.name: Mixture(self._sequence_weights(phase.mixture)) for phase in phases}

    def _sequence_weights(self, weights: Mapping[str, float]) -> dict[str, Fraction]:
        """Convert weights of tokens to weights of sequences: packings differ in their padding."""
        return {
            name: (Fraction(repr(weights.get(name, 0))) if weights else packing.num_tokens)
            * Fraction(packing.sequences_per_epoch, packing.num_tokens)
            for name, packing in self.packings.items()
        }

    def at_step(self, position: DataPosition, step: int, max_steps: int) -> DataPosition:
        """Return ``position`` in the phase that optimizer step ``step`` belongs to."""
        phase = self.phases[phase_at(step, max_steps, self.phases)].name
        return (
            position
            if phase == position.phase
            else DataPosition(position.row, phase, position.row, self.taken(position))
        )

    def locate(self, position: DataPosition, index: int) -> tuple[str, int]:
        """Return (source, index in the source) of the run's sequence ``index``, in the phase of ``position``."""
        source, index_in_phase = self.mixtures[position.phase].locate(index - position.phase_row)
        return source, position.taken.get(source, 0) + index_in_phase

    def taken(self, position: DataPosition) -> dict[str, int]:
        """Return the number of sequences of each source consumed so far."""
        in_phase = self.mixtures[position.phase].counts(position.row - position.phase_row) if position.phase else {}
        return {name: position.taken.get(name, 0) + in_phase.get(name, 0) for name in self.packings}

    def epochs(self, position: DataPosition) -> dict[str, float]:
        """Return how many epochs of each source have been consumed."""
        return {name: count / self.packings[name].sequences_per_epoch for name, count in self.taken(position).items()}


def phase_at(step: int, max_steps: int, phases: Sequence[PhaseSettings]) -> int:
    """Return the index of the phase that optimizer step ``step`` (from 0) belongs to."""
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
        problems.append(f"--training.phases: every phase needs a different, non-empty name; the names are {names}")
    if abs(sum(phase.share for phase in phases) - 1) > 1e-6 or min(phase.share for phase in phases) <= 0:
        problems.append(
            f"--training.phases: the shares are {', '.join(f'{phase.share:g}' for phase in phases)}; each must be more "
            "than 0, and they must sum to 1"
        )
    for phase in phases:
        unknown = sorted(set(phase.mixture) - set(sources))
        if unknown:
            problems.append(
                f"the mixture of {phase.name} names {', '.join(unknown)}, but the shards hold {', '.join(sources)}"
            )
        weights = phase.mixture.values()
        if weights and not (all(0 <= weight < float("inf") for weight in weights) and sum(weights) > 0):
            problems.append(f"the mixture of {phase.name} is {phase.mixture}; weights must be 0 or more, not all 0")
    if problems:
        raise UserError("\n".join(problems))
