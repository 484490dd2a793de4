"""What plans cost in each currency: parameters, which are counted, and what was measured.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from search.budget import Currency
from trainers.measure import Table, variant
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan


class Price(NamedTuple):
    """What one block costs; see search.solver.Piece."""

    cost: int
    peak: int = 0


@dataclass(frozen=True)
class Costs:
    """One currency's prices."""

    outside: int
    """Of what no block holds."""
    blocks: Mapping[BlockPlan, Price]

    def of(self, plan: Plan) -> int:
        """Of a whole student."""
        prices = [self.blocks[block] for block in plan.blocks]
        return self.outside + sum(p.cost for p in prices) + max(p.peak for p in prices)


def costs_in(
    currency: Currency,
    family: Family,
    config: Config,
    blocks: Iterable[BlockPlan],
    table: Table | None = None,
) -> Costs:
    """The prices of some blocks. Latency and memory need the table that was measured.

    Peak memory is the weights' and, on top, the most that anything alive beside them takes while
    the outside or any one block runs.
    """
    if currency == "parameters":
        counts = {block: Price(family.block_parameters(config, block)) for block in blocks}
        return Costs(family.outside_parameters(config), counts)
    assert table is not None, currency
    measured = {block: table.blocks[variant(family, config, block)] for block in blocks}
    if currency == "latency":
        latencies = {block: Price(found.latency) for block, found in measured.items()}
        return Costs(table.outside.latency, latencies)
    each, around = table.bytes_each, table.outside.memory
    return Costs(
        each * family.outside_parameters(config) + around,
        {
            block: Price(each * family.block_parameters(config, block), max(0, m.memory - around))
            for block, m in measured.items()
        },
    )


def plan_costs(
    plan: Plan, family: Family, config: Config, table: Table | None
) -> dict[Currency, int]:
    """What a plan costs in every currency that is known: only parameters without a table."""
    known: tuple[Currency, ...] = ("parameters", "memory", "latency") if table else ("parameters",)
    return {c: costs_in(c, family, config, plan.blocks, table).of(plan) for c in known}
