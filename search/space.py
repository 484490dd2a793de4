"""The plans that a library can make, as points that Optuna proposes.

A point *holds* boundaries between teacher blocks, each by a number in [0, 1]: 0 leaves a boundary
to the measured damage of the pieces, 1 forbids merging across it. The exact solver then makes the
best plan under the budget with the damages so reweighted, so every point is a valid plan that fits
and uses its budget. All zeros is the exact plan itself: the search moves away from it only where
scored plans say that summed damage misleads. Widths and text streams are held in the same way,
block by block; and where pieces of several starts are at hand, each of these starts against the
others.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, get_args

from search.budget import Currency
from search.costs import costs_in
from search.solver import Partition, Piece, Pieces, best_partitions, smallest
from trainers.measure import Table
from trainers.students.families import family_named
from trainers.students.families.base import Config
from trainers.students.plan import BlockPlan, Ffn, Plan, PlanError, Start, Text

Holds = Mapping[str, float]

_FORBIDDEN = 1e6
"""Penalty of a hold of 1, in units of a typical piece's damage."""


class Suggests(Protocol):
    """The one thing of an `optuna.Trial` that a space needs."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...


@dataclass(frozen=True)
class Space:
    """Every plan over some pieces, which have their costs in one currency."""

    family: str
    teacher_blocks: int
    outside: int
    """What is outside the blocks costs."""
    pieces: Pieces
    others: Mapping[Currency, Space] = field(default_factory=dict)
    """The same plans, with their costs in other currencies."""

    def within(self, currency: Currency) -> Space:
        """The same plans, with their costs in a currency that is known."""
        return self if currency == "parameters" else self.others[currency]

    @cached_property
    def smallest(self) -> int:
        """What the cheapest plan costs."""
        return smallest(self.pieces, self.teacher_blocks, self.outside)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The numbers a point has: `keep_i` holds the boundary before block i, `wide_i` the FFN
        width of block i, `dual_i` its text stream, `average_i` that what replaces it starts from
        an average, and so for each start. Only what some piece gives up."""
        given_up = {name for names in self._given_up.values() for name in names}
        kinds = ("keep", "wide", "dual", *get_args(Start))
        every = (f"{kind}_{i}" for kind in kinds for i in range(self.teacher_blocks))
        return tuple(name for name in every if name in given_up)

    def suggest(self, trial: Suggests) -> Holds:
        """A point, drawn by an Optuna trial."""
        return {name: trial.suggest_float(name, 0.0, 1.0) for name in self.names}

    def plans(self, holds: Holds, limit: int) -> Iterator[Plan]:
        """The plans of a point that cost at most `limit`: its own first, then the next best.

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
                    f"block {i}: the library has no replacement for {block}; make it first"
                )
        given_up = {name for block in plan.blocks for name in self._given_up[block]}
        return {name: 0.0 if name in given_up else 1.0 for name in self.names}

    def holds(self, plan: Plan) -> bool:
        """Whether every block of a plan is at hand."""
        return all(block in self.pieces for block in plan.blocks)

    def cost(self, plan: Plan) -> int:
        """What a plan over these pieces costs."""
        pieces = [self.pieces[block] for block in plan.blocks]
        return self.outside + sum(p.cost for p in pieces) + max(p.peak for p in pieces)

    def damage(self, plan: Plan) -> float:
        """Summed damage of a plan over these pieces."""
        return sum(self.pieces[block].damage for block in plan.blocks)

    def exact(self, limit: int, count: int = 1) -> list[Plan]:
        """The plans of least summed damage within the limit, best first."""
        found = best_partitions(self.pieces, self.teacher_blocks, self.outside, limit, count)
        return [self.plan(partition) for partition in found]

    def plan(self, partition: Partition) -> Plan:
        return Plan(family=self.family, teacher_blocks=self.teacher_blocks, blocks=partition.blocks)

    @cached_property
    def _unit(self) -> float:
        damages = [piece.damage for piece in self.pieces.values() if piece.damage > 0]
        return statistics.median(damages) if damages else 1.0

    @cached_property
    def _given_up(self) -> dict[BlockPlan, list[str]]:
        """What each piece gives up; boundary i lies before teacher block i."""
        changed = [block for block in self.pieces if not block.untouched]
        starts: list[set[Start]] = [set() for _ in range(self.teacher_blocks)]
        # The longest first, of which every start makes another block: where one of them names a
        # shorter block too, that needs no name of its own.
        for block in sorted(changed, key=lambda block: (-block.length, block.start)):
            for i in _places(block):
                if starts[i].isdisjoint(block.starts):
                    starts[i].add(block.start)

        def names(block: BlockPlan) -> Iterator[str]:
            places = _places(block)
            yield from (f"keep_{i}" for i in places[1:])
            if block.ffn != 1.0:
                yield from (f"wide_{i}" for i in places)
            if block.text != "dual":
                yield from (f"dual_{i}" for i in places)
            # Sorted: a set has another order in every process, and sums differ by their order.
            yield from (f"{s}_{i}" for i in places for s in sorted(starts[i] - block.starts))

        return {block: [] if block.untouched else list(names(block)) for block in self.pieces}

    def _held(self, block: BlockPlan, piece: Piece, holds: Holds) -> Piece:
        penalty = sum(_penalty(holds[name]) for name in self._given_up[block])
        return piece._replace(damage=piece.damage + self._unit * penalty)


def candidates(
    teacher_blocks: int,
    max_span: int,
    widths: Sequence[Ffn],
    texts: Sequence[Text] = ("dual",),
    starts: Sequence[Start] = ("library",),
) -> list[BlockPlan]:
    """Every block that a plan may have: spans up to `max_span`, with the teacher's FFN and text
    stream and with each other width and text, from each start."""
    spans = [
        (first, first + length - 1)
        for length in range(1, max_span + 1)
        for first in range(teacher_blocks - length + 1)
    ]
    return [
        block
        for span in spans
        for ffn in dict.fromkeys((1.0, *widths))
        for text in dict.fromkeys(("dual", *texts))
        if span[0] > 0 or text != "projected"  # nothing before the first block has a text branch
        for block in started(BlockPlan(span=span, ffn=ffn, text=text), starts)
    ]


def started(block: BlockPlan, starts: Sequence[Start]) -> list[BlockPlan]:
    """The block of this span, width and text from each start that can make it; each block once."""
    # Cut from the teacher without training, linear maps would be zeros: where plans are scored and
    # students assembled nothing is fitted.
    mapped = block.text == "projected" or block.ffn == "linear"
    shape = block.model_dump(exclude={"start"})
    made: list[BlockPlan] = []
    for start in get_args(Start):
        if start in starts and (start == "library" or not mapped):
            one = BlockPlan(**shape, start=start)
            if not any(one.start in other.starts for other in made):
                made.append(one)
    return made


def priced_space(
    family: str,
    config: Config,
    damages: Mapping[BlockPlan, float],
    table: Table | None = None,
) -> Space:
    """The space of the blocks that have a damage, for a teacher with this config; in parameters,
    and with a table of what was measured also in memory and latency."""
    known = family_named(family)

    def priced(currency: Currency, others: Mapping[Currency, Space]) -> Space:
        costs = costs_in(currency, known, config, damages, table)
        pieces = {block: Piece(damage, *costs.blocks[block]) for block, damage in damages.items()}
        return Space(family, known.blocks(config), costs.outside, pieces, others)

    measured: tuple[Currency, ...] = ("memory", "latency") if table is not None else ()
    return priced("parameters", {currency: priced(currency, {}) for currency in measured})


def _penalty(hold: float) -> float:
    """0 at 0, 1 at one half, practically infinite at 1."""
    return hold / (1 - hold) if hold < 1 - 1 / _FORBIDDEN else _FORBIDDEN


def _places(block: BlockPlan) -> range:
    """The teacher blocks of its span."""
    return range(block.span[0], block.span[1] + 1)
