"""Every point of the space is a valid plan under its budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solver import Piece
from search.space import Space, candidates
from trainers.students.plan import BlockPlan, PlanError

BLOCKS = 8
OWN = 10


def make_space(damages: list[int]) -> Space:
    pieces = {}
    for block, damage in zip(
        candidates(BLOCKS, 3, (1.0, 0.5)), itertools.cycle(damages)
    ):  # endless
        parameters = OWN if block.ffn == 1 else 7
        pieces[block] = Piece(0 if block.untouched else damage, parameters)
    return Space("qwen_image", BLOCKS, 5, pieces)


spaces = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(make_space)
limits = st.integers(26, 85)


@settings(max_examples=60, deadline=None)
@given(spaces, limits, st.data())
def test_every_point_is_a_valid_plan_under_the_budget(
    space: Space, limit: int, data: st.DataObject
) -> None:
    holds = {name: data.draw(st.floats(0, 1)) for name in space.names}
    plan = next(space.plans(holds, limit))
    assert space.cost(plan) <= limit
    assert all(block in space.pieces for block in plan.blocks)


@settings(max_examples=40, deadline=None)
@given(spaces, limits)
def test_the_point_of_zeros_is_the_exact_plan(space: Space, limit: int) -> None:
    plan = next(space.plans(dict.fromkeys(space.names, 0.0), limit))
    assert space.damage(plan) == space.damage(space.exact(limit)[0])


@settings(max_examples=60, deadline=None)
@given(spaces, limits, st.data())
def test_a_plan_comes_back_from_its_point_under_its_own_size(
    space: Space, limit: int, data: st.DataObject
) -> None:
    holds = {name: data.draw(st.floats(0, 1)) for name in space.names}
    plan = next(space.plans(holds, limit))
    again = next(space.plans(space.encode(plan), space.cost(plan)))
    # What is held stays; where the point is free, only less damage at no more parameters differs.
    if again != plan:
        assert space.damage(again) <= space.damage(plan)
        assert space.cost(again) <= space.cost(plan)


def test_a_point_gives_every_plan_once() -> None:
    space = make_space([1, 2, 3])
    plans = list(space.plans(dict.fromkeys(space.names, 0.5), 45))
    assert len({plan.digest for plan in plans}) == len(plans) > 100
    assert all(space.cost(plan) <= 45 for plan in plans)


def test_a_plan_beyond_the_library_is_refused_with_its_block() -> None:
    space = make_space([1])
    plan = space.exact(85)[0]
    foreign = BlockPlan(span=plan.blocks[0].span, start="library", ffn=0.25)
    with pytest.raises(PlanError, match="block 0"):
        space.encode(plan.model_copy(update={"blocks": (foreign, *plan.blocks[1:])}))
