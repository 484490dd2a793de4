"""The best partition under a budget, exactly: dynamic programming over the teacher's blocks.

A *piece* is one possible block of a student: the damage it does alone, and what it costs in the
budget's currency, a whole number. Damages add up, which is an estimate; costs add up exactly. A
label stands for one way to cover the first blocks; of labels at the same place only those survive
that fewer than `count` others match in both cost and damage, so the `count` best whole plans are
never lost.

What keeps the labels few is a price: at the price of a unit of cost at which the best plan just
fits (Lagrange's multiplier), what the rest of a plan costs at least is known from every block on,
and a label that cannot end within a margin of the best is dropped. The margin grows until enough
plans lie within it, so the answer is exact.

Of peak memory one part does not add up: what a block needs while it runs, of which a plan pays the
largest. A plan with a largest *peak* p is one over the pieces of at most that peak, under a budget
less by p; so every peak is tried, and there are as few as there are shapes of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.budget import BudgetError
from trainers.students.plan import BlockPlan

Pieces = Mapping[BlockPlan, "Piece"]
_Mask = NDArray[np.bool_]


class Piece(NamedTuple):
    """What one possible block costs."""

    damage: float
    """Fidelity loss when it alone replaces its span; at least 0."""
    cost: int
    """In the budget's currency; adds up over a plan."""
    peak: int = 0
    """On top while it runs; of a plan's, the largest counts."""


class Partition(NamedTuple):
    """Pieces that cover the teacher."""

    damage: float
    """Sum over its pieces."""
    cost: int
    """Of the whole student, with what is outside the blocks and the largest peak."""
    blocks: tuple[BlockPlan, ...]


class _Step(NamedTuple):
    """A piece among those that start at one block."""

    end: int
    """Teacher blocks covered once it is placed."""
    damage: float
    cost: int
    block: BlockPlan


_Steps = list[list[_Step]]
"""By the block that they start at."""


@dataclass(frozen=True)
class _Labels:
    """Ways to cover the first blocks, by cost, then damage."""

    cost: NDArray[np.int64]
    damage: NDArray[np.float64]
    covered: NDArray[np.int64]
    """Blocks that the way covers before its last step."""
    step: NDArray[np.int64]
    """Its last step, among those that start at `covered`."""
    before: NDArray[np.int64]
    """The label there that it goes on from."""

    def __len__(self) -> int:
        return len(self.cost)

    def only(self, kept: NDArray[np.intp] | NDArray[np.bool_]) -> _Labels:
        return _Labels(
            self.cost[kept],
            self.damage[kept],
            self.covered[kept],
            self.step[kept],
            self.before[kept],
        )


@dataclass(frozen=True)
class _Price:
    """What a unit of cost is worth in damage where the best plan just fits, and what that says."""

    unit: float
    rest: NDArray[np.float64]
    """Least damage and priced cost of the blocks from each on."""
    bound: float
    """No plan that fits does less damage."""
    fits: float
    """The damage of a plan that fits."""


def best_partitions(
    pieces: Pieces, teacher_blocks: int, outside: int, limit: int, count: int = 1
) -> list[Partition]:
    """The `count` partitions of least summed damage that cost at most `limit`, best first.

    `outside` is what no piece costs. Fewer come back when fewer exist. Raises BudgetError when none
    fits, naming the smallest.
    """
    found: dict[tuple[BlockPlan, ...], Partition] = {}
    for peak, some in _by_peak(pieces):
        for partition in _best(some, teacher_blocks, outside, limit - peak, count):
            found[partition.blocks] = _with_peak(partition, pieces)
    if not found:
        raise BudgetError(
            f"no plan costs at most {limit:,}; the smallest reachable costs "
            f"{smallest(pieces, teacher_blocks, outside):,}"
        )
    return sorted(found.values(), key=lambda p: (p.damage, p.cost))[:count]


def _best(
    pieces: Pieces, teacher_blocks: int, outside: int, limit: int, count: int
) -> list[Partition]:
    """What `best_partitions` gives where peaks do not count; nothing when none fits."""
    room = limit - outside
    steps = _steps(pieces, teacher_blocks, count)
    if _least_after(steps)[0] > room:
        return []
    price = _price(steps, room)
    widest = sum(max((s.damage for s in starting), default=0.0) for starting in steps)
    margin = max((price.fits - price.bound) / 16, 1e-6 * widest)
    while True:
        labels = _forward(steps, room, count, price, margin)
        ends = labels[-1].only(np.lexsort((labels[-1].cost, labels[-1].damage)))
        within = int((ends.damage <= price.bound + margin).sum())
        if within >= count or price.bound + margin >= widest:
            found = range(min(count, len(ends)))
            return [_partition(steps, labels, ends, i, outside) for i in found]
        margin *= 2


def budget_curve(pieces: Pieces, teacher_blocks: int, outside: int) -> list[Partition]:
    """The best partition at every size: each does less damage than all that cost less."""
    smallest(pieces, teacher_blocks, outside)
    ends: list[Partition] = []
    for _, some in _by_peak(pieces):
        steps = _steps(some, teacher_blocks, 1)
        labels = _forward(steps, None, 1)
        found = (_partition(steps, labels, labels[-1], i, outside) for i in range(len(labels[-1])))
        ends += [_with_peak(partition, pieces) for partition in found]
    curve: list[Partition] = []
    for partition in sorted(ends, key=lambda p: (p.cost, p.damage)):
        if not curve or partition.damage < curve[-1].damage:
            curve.append(partition)
    return curve


def smallest(pieces: Pieces, teacher_blocks: int, outside: int) -> int:
    """The cost of the cheapest student these pieces can make; BudgetError when they make none."""
    each = (
        _least_after(_steps(some, teacher_blocks, 1))[0] + peak for peak, some in _by_peak(pieces)
    )
    rest = min(each, default=math.inf)
    if rest == math.inf:
        raise BudgetError(
            f"the pieces at hand leave a gap among the teacher's {teacher_blocks} blocks; "
            "offer each block as it is"
        )
    return outside + int(rest)


def damages_through(
    pieces: Pieces, teacher_blocks: int, outside: int, limit: int
) -> dict[BlockPlan, float]:
    """For each piece, the least damage of any partition within `limit` that contains it.

    Pieces that fit in no such partition are left out.
    """
    through: dict[BlockPlan, float] = {}
    for peak, some in _by_peak(pieces):
        for block, damage in _through(some, teacher_blocks, limit - outside - peak):
            through[block] = min(damage, through.get(block, math.inf))
    return through


def _through(pieces: Pieces, teacher_blocks: int, room: int) -> Iterator[tuple[BlockPlan, float]]:
    """What `damages_through` gives where peaks do not count."""
    mirrored = {_mirrored(b, teacher_blocks): piece for b, piece in pieces.items()}
    before = _forward(_steps(pieces, teacher_blocks, 1), room, 1)
    after = _forward(_steps(mirrored, teacher_blocks, 1), room, 1)
    for block, piece in pieces.items():
        first, last = block.span
        heads, tails = before[first], after[teacher_blocks - 1 - last]
        if not len(heads) or not len(tails):
            continue
        # Survivors are sorted by cost with falling damage: the dearest that fits is best.
        left = room - heads.cost - piece.cost
        fitting = np.searchsorted(tails.cost, left, side="right")
        some = fitting > 0
        if some.any():
            whole = heads.damage[some] + tails.damage[fitting[some] - 1]
            yield block, float(whole.min()) + piece.damage


def _by_peak(pieces: Pieces) -> Iterator[tuple[int, Pieces]]:
    """Every peak that may be a plan's largest, and the pieces of no larger one."""
    for peak in sorted({piece.peak for piece in pieces.values()}):
        yield peak, {block: piece for block, piece in pieces.items() if piece.peak <= peak}


def _with_peak(partition: Partition, pieces: Pieces) -> Partition:
    peak = max(pieces[block].peak for block in partition.blocks)
    return partition._replace(cost=partition.cost + peak)


def _forward(
    steps: _Steps, room: int | None, count: int, price: _Price | None = None, margin: float = 0.0
) -> list[_Labels]:
    """Surviving labels by how many blocks they cover, each list sorted by cost; with a price,
    only those that may end within the margin of its bound."""
    rest = _least_after(steps)
    reached: list[_Labels] = []
    # Of the labels that cover so many blocks, the least damage and priced cost.
    priced: list[float] = []
    most = math.inf
    if room is not None and price is not None:
        most = price.bound + price.unit * room + margin
        most += 1e-9 * abs(most)

    def hopeful(covered: int, cost: NDArray[np.int64], damage: NDArray[np.float64]) -> _Mask:
        fits = cost + rest[covered] <= (math.inf if room is None else room)
        if price is None:
            return fits
        return fits & (damage + price.unit * cost + price.rest[covered] <= most)

    def extended(covered: int) -> Iterator[_Labels]:
        """Every hopeful label by one step, where that covers so many blocks."""
        for first, number, step in arriving[covered]:
            if price is not None:
                # In another order of additions than in `hopeful`, hence the slack.
                least = priced[first] + step.damage + price.unit * step.cost + price.rest[covered]
                if least > most + 1e-9 * abs(most):
                    continue
            labels = reached[first]
            cost = labels.cost + step.cost
            damage = labels.damage + step.damage
            before = np.flatnonzero(hopeful(covered, cost, damage))
            if len(before):
                yield _Labels(
                    cost[before],
                    damage[before],
                    np.full(len(before), first),
                    np.full(len(before), number),
                    before,
                )

    def reach(labels: _Labels) -> None:
        reached.append(labels)
        if price is not None:
            totals = labels.damage + price.unit * labels.cost
            priced.append(float(totals.min(initial=math.inf)))

    arriving: list[list[tuple[int, int, _Step]]] = [[] for _ in range(len(steps) + 1)]
    for first, starting in enumerate(steps):
        for number, step in enumerate(starting):
            arriving[step.end].append((first, number, step))
    reach(_START)
    for covered in range(1, len(steps) + 1):
        reach(_survivors(_joined(list(extended(covered))), count))
    return reached


def _joined(parts: list[_Labels]) -> _Labels:
    if not parts:
        return _START.only(np.zeros(1, dtype=bool))
    return _Labels(
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.damage for part in parts]),
        np.concatenate([part.covered for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.before for part in parts]),
    )


def _survivors(labels: _Labels, count: int) -> _Labels:
    """Those that fewer than `count` others match in both, peeled off front by front."""
    labels = labels.only(np.lexsort((labels.damage, labels.cost)))
    left, kept = np.arange(len(labels)), np.zeros(len(labels), dtype=bool)
    for _ in range(count):
        if not len(left):
            break
        damage = labels.damage[left]
        front = np.ones(len(left), dtype=bool)
        front[1:] = damage[1:] < np.minimum.accumulate(damage)[:-1]
        kept[left[front]] = True
        left = left[~front]
    return labels.only(kept)


def _price(steps: _Steps, room: int) -> _Price:
    """The price at which the cheapest plan turns from too large to fitting.

    Between a plan that is too large and one that fits lies the price that makes them equal; what is
    cheapest there either replaces one of them or shows that there is nothing in between.
    """
    rest, large, damage = _cheapest(steps, 0.0)
    if large <= room:
        return _Price(0.0, rest, damage, damage)
    fit, fit_damage = _smallest(steps)
    while True:
        price = (fit_damage - damage) / (large - fit)
        rest, size, found = _cheapest(steps, price)
        cost = found + price * size
        if not fit < size < large or cost >= fit_damage + price * fit - 1e-12 * abs(cost):
            return _Price(price, rest, cost - price * room, fit_damage)
        if size <= room:
            fit, fit_damage = size, found
        else:
            large, damage = size, found


def _cheapest(steps: _Steps, price: float) -> tuple[NDArray[np.float64], float, float]:
    """Least damage + price × cost of the blocks from each on; of the whole plan that has the least,
    cost and damage. Of equals the one that costs less."""
    rest = np.full(len(steps) + 1, math.inf)
    size, damage = [0.0] * (len(steps) + 1), [0.0] * (len(steps) + 1)
    rest[-1] = 0.0
    for first in reversed(range(len(steps))):
        best = (math.inf, math.inf, 0.0)
        for step in steps[first]:
            cost = step.damage + price * step.cost + rest[step.end]
            whole = step.cost + size[step.end]
            if (cost, whole) < best[:2]:
                best = (cost, whole, step.damage + damage[step.end])
        rest[first], size[first], damage[first] = best
    return rest, size[0], damage[0]


def _smallest(steps: _Steps) -> tuple[float, float]:
    """Cost and damage of the cheapest plan; of equals the one of least damage."""
    best: list[tuple[float, float]] = [(math.inf, math.inf)] * len(steps) + [(0.0, 0.0)]
    for first in reversed(range(len(steps))):
        for step in steps[first]:
            size, damage = best[step.end]
            best[first] = min(best[first], (step.cost + size, step.damage + damage))
    return best[0]


def _least_after(steps: _Steps) -> list[float]:
    """Least cost of pieces that cover the blocks from each on; infinite where none do."""
    least = [math.inf] * len(steps) + [0.0]
    for first in reversed(range(len(steps))):
        sizes = (step.cost + least[step.end] for step in steps[first])
        least[first] = min(sizes, default=math.inf)
    return least


def _steps(pieces: Pieces, teacher_blocks: int, count: int) -> _Steps:
    """The pieces by the block that they start at; of one span, those that fewer than `count` others
    match in both cost and damage."""
    spans: dict[tuple[int, int], list[_Step]] = {}
    for block in _in_order(pieces):
        piece = pieces[block]
        step = _Step(block.span[1] + 1, piece.damage, piece.cost, block)
        spans.setdefault(block.span, []).append(step)
    steps: _Steps = [[] for _ in range(teacher_blocks)]
    for (first, _), offered in spans.items():
        for at, step in enumerate(offered):
            matching = (
                other.cost <= step.cost
                and other.damage <= step.damage
                # Of equals the first in order matches the others.
                and (i < at or (other.cost, other.damage) != (step.cost, step.damage))
                for i, other in enumerate(offered)
                if i != at
            )
            if sum(matching) < count:
                steps[first].append(step)
    return steps


def _in_order(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    # Ties between plans must not depend on the order in which a library was listed.
    return sorted(blocks, key=lambda b: (b.span, b.kept, b.start, b.text, b.text_map))


def _mirrored(block: BlockPlan, teacher_blocks: int) -> BlockPlan:
    first, last = block.span
    return block.model_copy(
        update={"span": (teacher_blocks - 1 - last, teacher_blocks - 1 - first)}
    )


def _partition(
    steps: _Steps, reached: list[_Labels], ends: _Labels, at: int, outside: int
) -> Partition:
    """The plan of a label that covers everything."""
    damage, cost = float(ends.damage[at]), outside + int(ends.cost[at])
    blocks: list[BlockPlan] = []
    labels, covered = ends, len(steps)
    while covered:
        covered, number, before = (int(a[at]) for a in (labels.covered, labels.step, labels.before))
        blocks.append(steps[covered][number].block)
        labels, at = reached[covered], before
    return Partition(damage, cost, tuple(reversed(blocks)))


_START = _Labels(
    np.zeros(1, dtype=np.int64),
    np.zeros(1),
    np.zeros(1, dtype=np.int64),
    np.zeros(1, dtype=np.int64),
    np.zeros(1, dtype=np.int64),
)
