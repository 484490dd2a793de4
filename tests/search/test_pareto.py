"""The Pareto front against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from search.pareto import best_within, pareto_front

Point = tuple[int, int]
points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


def beats(a: Point, b: Point) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


@given(points)
def test_the_front_is_what_nothing_beats(items: list[Point]) -> None:
    front = pareto_front(items, lambda point: point)
    assert front == sorted({p for p in items if not any(beats(q, p) for q in items)})


@given(points, st.integers(0, 8), st.integers(1, 4))
def test_best_within_a_limit(items: list[Point], limit: int, count: int) -> None:
    found = best_within(items, limit, lambda p: p[0], lambda p: p[1], count)
    assert [p[1] for p in found] == sorted(p[1] for p in items if p[0] <= limit)[:count]
