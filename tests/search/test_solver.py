"""The solver against brute force."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import CURRENCIES, BudgetError, Currency
from search.solver import (
    Piece,
    Pieces,
    best_partitions,
    budget_curve,
    damages_through,
    smallest,
)
from trainers.students.plan import BlockPlan, Start

BLOCKS = 8
OUTSIDE = 5


@st.composite
def libraries(draw: st.DrawFn) -> dict[BlockPlan, Piece]:
    """The teacher's own blocks and some replacements, in any currency: parameters, latencies that
    are no round numbers, or memory with its peaks. Whole damages keep sums exact."""
    currency = draw(st.sampled_from(CURRENCIES))
    own, other = draw(st.integers(8, 10)), draw(st.integers(5, 12))
    costs = {
        "parameters": {1.0: (own, 0), 0.5: (6, 0)},
        "latency": {1.0: (own, 0), 0.5: (other, 0)},
        # A narrow block may hold less weight and need more to run, or the other way round.
        "memory": {1.0: (own, draw(st.integers(0, 9))), 0.5: (6, draw(st.integers(0, 9)))},
    }[currency]
    pieces = {BlockPlan(span=(i, i)): Piece(0, *costs[1.0]) for i in range(BLOCKS)}
    if currency == "parameters":
        pieces = {block: Piece(0, draw(st.integers(8, 10))) for block in pieces}
    spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 4)).map(
        lambda s: (s[0], min(BLOCKS - 1, s[0] + s[1] - 1))
    )
    shapes = st.tuples(spans, st.sampled_from([1.0, 0.5]), st.sampled_from(get_args(Start)))
    for span, ffn, start in draw(st.lists(shapes, max_size=16)):
        block = BlockPlan(span=span, start=start, ffn=ffn)
        if not block.untouched:
            pieces[block] = Piece(draw(st.integers(1, 20)), *costs[ffn])
    return pieces


def every_partition(
    pieces: Pieces, first: int = 0, peak: int = 0
) -> list[tuple[float, int, tuple[BlockPlan, ...]]]:
    if first == BLOCKS:
        return [(0, OUTSIDE + peak, ())]
    return [
        (piece.damage + damage, piece.cost + cost, (block, *blocks))
        for block, piece in pieces.items()
        if block.span[0] == first
        for damage, cost, blocks in every_partition(
            pieces, block.span[1] + 1, max(peak, piece.peak)
        )
    ]


@settings(max_examples=60, deadline=None)
@given(libraries(), st.integers(30, 90), st.integers(1, 6))
def test_finds_what_brute_force_finds(
    pieces: dict[BlockPlan, Piece], limit: int, count: int
) -> None:
    all_of_them = every_partition(pieces)
    fitting = sorted(p[0] for p in all_of_them if p[1] <= limit)
    assert smallest(pieces, BLOCKS, OUTSIDE) == min(p[1] for p in all_of_them)
    if not fitting:
        with pytest.raises(BudgetError, match="smallest"):
            best_partitions(pieces, BLOCKS, OUTSIDE, limit, count)
        return
    found = best_partitions(pieces, BLOCKS, OUTSIDE, limit, count)
    assert [partition.damage for partition in found] == fitting[:count]
    assert len({partition.blocks for partition in found}) == len(found)
    assert {(p.damage, p.cost, p.blocks) for p in found} <= set(all_of_them)


@pytest.mark.parametrize("currency", CURRENCIES)
def test_every_budget_of_a_library_of_every_span(currency: Currency) -> None:
    """Eight blocks, all their 36 spans in two widths, 4,374 plans; every budget there is."""
    rng, pieces = random.Random(currency), dict[BlockPlan, Piece]()
    for first in range(BLOCKS):
        for last in range(first, BLOCKS):
            for ffn in (1.0, 0.5):
                block = BlockPlan(span=(first, last), start="library", ffn=ffn)
                cost, peak = rng.randint(5, 9) + round(3 * ffn), rng.randint(0, 9)
                damage = rng.randint(1, 20) * (last - first + 1)
                pieces[block] = Piece(damage, cost, peak if currency == "memory" else 0)
    plans = sorted((damage, cost) for damage, cost, _ in every_partition(pieces))
    assert len(plans) == 2 * 3 ** (BLOCKS - 1)
    costs = {cost for _, cost in plans}
    for limit in range(min(costs), max(costs) + 1):
        expected = [damage for damage, cost in plans if cost <= limit][:3]
        found = best_partitions(pieces, BLOCKS, OUTSIDE, limit, 3)
        assert [partition.damage for partition in found] == expected
        assert all(partition.cost <= limit for partition in found)
    with pytest.raises(BudgetError, match=f"smallest reachable costs {min(costs):,}"):
        best_partitions(pieces, BLOCKS, OUTSIDE, min(costs) - 1)


@settings(max_examples=60, deadline=None)
@given(libraries())
def test_the_curve_is_the_best_of_every_budget(pieces: dict[BlockPlan, Piece]) -> None:
    curve = budget_curve(pieces, BLOCKS, OUTSIDE)
    every = set(every_partition(pieces))
    expected: list[tuple[int, float]] = []
    for cost, damage in sorted((p[1], p[0]) for p in every):
        if not expected or damage < expected[-1][1]:
            expected.append((cost, damage))
    assert [(p.cost, p.damage) for p in curve] == expected
    for partition in curve:
        assert (partition.damage, partition.cost, partition.blocks) in every
        best = best_partitions(pieces, BLOCKS, OUTSIDE, partition.cost)[0]
        assert best[:2] == partition[:2]


@settings(max_examples=30, deadline=None)
@given(libraries(), st.integers(40, 90))
def test_damage_through_a_piece_is_that_of_the_best_plan_with_it(
    pieces: dict[BlockPlan, Piece], limit: int
) -> None:
    expected: dict[BlockPlan, float] = {}
    for damage, cost, blocks in every_partition(pieces):
        if cost <= limit:
            for block in blocks:
                expected[block] = min(damage, expected.get(block, math.inf))
    assert damages_through(pieces, BLOCKS, OUTSIDE, limit) == expected


@settings(max_examples=60, deadline=None)
@given(libraries(), st.integers(40, 90), st.integers(0, 2**16))
def test_real_damages_are_as_exact_as_whole_ones(
    pieces: dict[BlockPlan, Piece], limit: int, seed: int
) -> None:
    rng = random.Random(seed)
    uneven = {b: Piece(p.damage * rng.lognormvariate(0, 2), *p[1:]) for b, p in pieces.items()}
    fitting = sorted(p[0] for p in every_partition(uneven) if p[1] <= limit)
    if fitting:
        found = best_partitions(uneven, BLOCKS, OUTSIDE, limit, 4)
        assert [p.damage for p in found] == pytest.approx(fitting[:4], rel=1e-12)


def test_the_order_of_the_library_does_not_matter() -> None:
    own = {BlockPlan(span=(i, i)): Piece(0.0, 10) for i in range(BLOCKS)}
    pairs = {BlockPlan(span=(i, i + 1), start="library"): Piece(1.0, 10) for i in range(BLOCKS - 1)}
    pieces = own | pairs
    backwards = dict(reversed(pieces.items()))
    assert best_partitions(pieces, BLOCKS, 0, 50, 5) == best_partitions(backwards, BLOCKS, 0, 50, 5)


def test_a_gap_in_the_library_is_named() -> None:
    with pytest.raises(BudgetError, match="gap"):
        smallest({BlockPlan(span=(1, 7)): Piece(0.0, 1)}, BLOCKS, 0)
