"""The plans that a library can make, as points that Optuna proposes.

A point *holds* boundaries between teacher blocks, each by a number in [0, 1]: 0 leaves a boundary
to the measured damage of the pieces, 1 forbids merging across it. The exact solver then makes the
best plan under the budget with the damages so reweighted, so every point is a valid plan that fits
and uses its budget. All zeros is the exact plan itself: the search moves away from it only where
scored plans say that summed damage misleads. Widths are held in the same way, block by block.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from search.solver import Partition, Piece, Pieces, best_partitions, smallest
from trainers.students.families import family_named
from trainers.students.families.base import Config
from trainers.students.plan import BlockPlan, Plan, PlanError, uniform_plan

Holds = Mapping[str, float]

_FORBIDDEN = 1e6
"""Penalty of a hold of 1, in units of a typical piece's damage."""


class Suggests(Protocol):
    """The one thing of an `optuna.Trial` that a space needs."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...


@dataclass(frozen=True)
class Space:
    """Every plan over some pieces."""

    family: str
    teacher_blocks: int
    outside: int
    """Parameters outside the blocks."""
    pieces: Pieces

    @property
    def smallest(self) -> int:
        """Parameters of the smallest plan."""
        return smallest(self.pieces, self.teacher_blocks, self.outside)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The numbers a point has: `keep_i` holds the boundary before block i, `wide_i` the FFN
        width of block i. Only what some piece merges or narrows."""
        merged = {i for block in self.pieces for i in _inside(block)}
        narrowed = {i for block in self.pieces if block.ffn < 1 for i in _covered(block)}
        return (*(f"keep_{i}" for i in sorted(merged)), *(f"wide_{i}" for i in sorted(narrowed)))

    def suggest(self, trial: Suggests) -> Holds:
        """A point, drawn by an Optuna trial."""
        return {name: trial.suggest_float(name, 0.0, 1.0) for name in self.names}

    def plans(self, holds: Holds, limit: int) -> Iterator[Plan]:
        """The plans of a point within `limit` parameters: its own first, then the next best.

        Ends when every plan that fits has been given.
        """
        pieces = {block: self._held(block, piece, holds) for block, piece in self.pieces.items()}
        count, given = 1, 0
        while True:
            found = best_partitions(pieces, self.teacher_blocks, self.outside, limit, count)
            for partition in found[given:]:
                yield self.plan(partition)
            if len(found) < count:
                return
            count, given = 4 * count, count

    def encode(self, plan: Plan) -> Holds:
        """The point that holds exactly what the plan keeps.

        `plans` gives the plan itself first for it, unless the budget has room for more than the
        plan uses; then it spends that room. PlanError when a piece of the plan is not at hand.
        """
        for i, block in enumerate(plan.blocks):
            if block not in self.pieces:
                raise PlanError(
                    f"block {i}: the library has no replacement for span {list(block.span)} with "
                    f"ffn {block.ffn:g} and start {block.start!r}; train it first"
                )
        merged = {f"keep_{i}" for block in plan.blocks for i in _inside(block)}
        narrowed = {f"wide_{i}" for b in plan.blocks if b.ffn < 1 for i in _covered(b)}
        return {name: 0.0 if name in merged | narrowed else 1.0 for name in self.names}

    def parameters(self, plan: Plan) -> int:
        """Parameters of a plan over these pieces."""
        return self.outside + sum(self.pieces[block].parameters for block in plan.blocks)

    def damage(self, plan: Plan) -> float:
        """Summed damage of a plan over these pieces."""
        return sum(self.pieces[block].damage for block in plan.blocks)

    def exact(self, limit: int, count: int = 1) -> list[Plan]:
        """The plans of least summed damage within the limit, best first."""
        found = best_partitions(self.pieces, self.teacher_blocks, self.outside, limit, count)
        return [self.plan(partition) for partition in found]

    def uniform(self, limit: int) -> Plan | None:
        """The uniform plan of most blocks that fits and whose spans are all at hand, or None."""
        for blocks in range(self.teacher_blocks, 0, -1):
            plan = uniform_plan(self.family, self.teacher_blocks, blocks, start="library")
            at_hand = all(block in self.pieces for block in plan.blocks)
            if at_hand and self.parameters(plan) <= limit:
                return plan
        return None

    def plan(self, partition: Partition) -> Plan:
        return Plan(family=self.family, teacher_blocks=self.teacher_blocks, blocks=partition.blocks)

    @cached_property
    def _unit(self) -> float:
        damages = [piece.damage for piece in self.pieces.values() if piece.damage > 0]
        return statistics.median(damages) if damages else 1.0

    def _held(self, block: BlockPlan, piece: Piece, holds: Holds) -> Piece:
        names = [f"keep_{i}" for i in _inside(block)]
        if block.ffn < 1:
            names += [f"wide_{i}" for i in _covered(block)]
        penalty = sum(_penalty(holds[name]) for name in names)
        return Piece(piece.damage + self._unit * penalty, piece.parameters)


def candidates(teacher_blocks: int, max_span: int, widths: tuple[float, ...]) -> list[BlockPlan]:
    """Every block that a plan may have: spans up to `max_span`, FFN at 1.0 and the other widths."""
    spans = [
        (first, first + length - 1)
        for length in range(1, max_span + 1)
        for first in range(teacher_blocks - length + 1)
    ]
    fractions = sorted({1.0, *widths}, reverse=True)
    return [BlockPlan(span=s, start="library", ffn=f) for s in spans for f in fractions]


def smallest_parameters(config: Config, family: str, blocks: list[BlockPlan]) -> int:
    """Parameters of the smallest student that the blocks can make of a teacher with this config."""
    known = family_named(family)
    pieces = {b: Piece(0.0, known.block_parameters(config, b)) for b in blocks}
    return smallest(pieces, known.blocks(config), known.outside_parameters(config))


def _penalty(hold: float) -> float:
    """0 at 0, 1 at one half, practically infinite at 1."""
    return hold / (1 - hold) if hold < 1 - 1 / _FORBIDDEN else _FORBIDDEN


def _inside(block: BlockPlan) -> range:
    """The boundaries that a block merges across; boundary i lies before teacher block i."""
    return range(block.span[0] + 1, block.span[1] + 1)


def _covered(block: BlockPlan) -> range:
    return range(block.span[0], block.span[1] + 1)
