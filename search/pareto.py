"""Which results no other result beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pareto_front(
    items: Sequence[Item], objectives: Callable[[Item], tuple[float, ...]]
) -> list[Item]:
    """The items that none beats in one objective without losing in another; all are minimised.

    In order of their objectives. Of items with equal objectives the first stays.
    """
    front: list[tuple[tuple[float, ...], Item]] = []
    # Sorted by the first objective, only an earlier item can dominate a later one.
    for values, item in sorted(((objectives(i), i) for i in items), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(kept, values, strict=True)) for kept, _ in front):
            front.append((values, item))
    return [item for _, item in front]


def best_within(
    items: Iterable[Item],
    limit: int,
    cost: Callable[[Item], int],
    loss: Callable[[Item], float],
    count: int | None = 1,
) -> list[Item]:
    """The `count` items of lowest loss among those that cost at most `limit`, best first; all of
    them for None."""
    fitting = [item for item in items if cost(item) <= limit]
    return sorted(fitting, key=lambda item: (loss(item), cost(item)))[:count]
