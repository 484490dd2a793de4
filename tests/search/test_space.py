"""Every point of the space is a valid plan under its budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solver import Piece
from search.space import Space, candidates
from trainers.students.plan import BlockPlan, Plan, PlanError, Start

BLOCKS = 8
OWN = 10


def make_space(damages: list[int], starts: Sequence[Start] = ("library",)) -> Space:
    pieces = {}
    for block, damage in zip(
        candidates(BLOCKS, 3, (1.0, 0.5), starts=starts), itertools.cycle(damages)
    ):  # endless
        parameters = OWN if block.ffn == 1 else 7
        pieces[block] = Piece(0 if block.untouched else damage, parameters)
    return Space("qwen_image", BLOCKS, 5, pieces)


spaces = st.builds(
    make_space,
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.lists(st.sampled_from(get_args(Start)), min_size=1, max_size=3),
)
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
        for block in changed(again):
            for held in changed(plan):
                apart = block.span[1] < held.span[0] or held.span[1] < block.span[0]
                assert apart or block.starts & held.starts


def changed(plan: Plan) -> list[BlockPlan]:
    return [block for block in plan.blocks if not block.untouched]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    limits,
    st.lists(st.sampled_from(get_args(Start)), min_size=2, max_size=4, unique=True),
)
def test_a_start_that_is_held_everywhere_is_the_only_one(
    damages: list[int], limit: int, starts: list[Start]
) -> None:
    space = make_space(damages, starts)
    for start in starts:
        holds = {name: float(name.startswith(start)) for name in space.names}
        plan = next(space.plans(holds, limit))
        assert all(start in block.starts for block in changed(plan))


def test_starts_are_held_only_where_they_differ() -> None:
    def kinds(*starts: Start) -> set[str]:
        return {name.split("_")[0] for name in make_space([1], starts).names}

    assert kinds("library") == kinds("average") == {"keep", "wide"}
    # Narrow blocks of one span, which are spelt `first`, are their own average.
    assert kinds("library", "average") == {"keep", "wide", "average", "library"}
    assert kinds("first", "middle") == {"keep", "wide", "first", "middle"}

    trained = BlockPlan(span=(1, 2), start="library")
    averaged = BlockPlan(span=(2, 3), start="average")
    own = [BlockPlan(span=(i, i)) for i in range(4)]
    pieces = {block: Piece(1, 1) for block in (*own, trained, averaged)}
    space = Space("qwen_image", 4, 0, pieces)
    assert space.names == ("keep_2", "keep_3", "average_2", "library_2")


def test_spans_widths_and_texts_are_offered_with_every_start_that_can_make_them() -> None:
    every = ("first", "middle", "average", "library")
    made = candidates(4, 3, (0.5, "linear"), ("dual", "projected", "shared"), every)
    assert len(set(made)) == len(made)

    def starts(span: tuple[int, int], **shape: object) -> set[str]:
        wanted = BlockPlan.model_validate({"span": span, **shape})
        return {b.start for b in made if (b.span, b.ffn, b.text) == (span, wanted.ffn, wanted.text)}

    assert starts((0, 2)) == starts((1, 3), ffn=0.5, text="shared") == {*every}
    assert starts((1, 2)) == {"first", "average", "library"}  # where the middle one is the first
    assert starts((1, 1)) == {"first"}
    assert starts((1, 1), ffn=0.5) == {"first", "library"}
    assert starts((0, 2), ffn="linear") == starts((1, 3), text="projected") == {"library"}
    assert BlockPlan(span=(1, 2), start="middle") in candidates(4, 2, (), starts=("middle",))
    assert candidates(4, 3, (0.5,), starts=("library", "library")) == candidates(4, 3, (0.5,))


def test_a_point_gives_every_plan_once() -> None:
    space = make_space([1, 2, 3])
    plans = list(space.plans(dict.fromkeys(space.names, 0.5), 45))
    assert len({plan.digest for plan in plans}) == len(plans) > 100
    assert all(space.cost(plan) <= 45 for plan in plans)


def test_a_plan_beyond_the_library_is_refused_with_its_block() -> None:
    space = make_space([1])
    plan = space.exact(85)[0]
    for change, said in (({"ffn": 0.25}, "ffn 0.25"), ({"start": "average"}, "start average")):
        foreign = BlockPlan(**{"span": (0, 1), "start": "library", **change})
        with pytest.raises(PlanError, match=f"block 0: .* {said}"):
            space.encode(plan.model_copy(update={"blocks": (foreign, *plan.blocks[1:])}))
