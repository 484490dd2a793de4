"""The best partition under a budget, exactly: dynamic programming over the teacher's blocks.

A *piece* is one possible block of a student with what it costs: the damage it does alone, and its
parameters. Damages add up, which is an estimate; parameters add up exactly. A label stands for one
way to cover the first blocks; of labels at the same place only those survive that fewer than
`count` others match in both parameters and damage, so the `count` best whole plans are never lost.

What keeps the labels few is a price: at the price of a parameter at which the best plan just fits
(Lagrange's multiplier), what the rest of a plan costs at least is known from every block on, and a
label that cannot end within a margin of the best is dropped. The margin grows until enough plans
lie within it, so the answer is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    parameters: int


class Partition(NamedTuple):
    """Pieces that cover the teacher."""

    damage: float
    """Sum over its pieces."""
    parameters: int
    """Of the whole student, with what is outside the blocks."""
    blocks: tuple[BlockPlan, ...]


class _Step(NamedTuple):
    """A piece among those that start at one block."""

    end: int
    """Teacher blocks covered once it is placed."""
    damage: float
    parameters: int
    block: BlockPlan


_Steps = list[list[_Step]]
"""By the block that they start at."""


@dataclass(frozen=True)
class _Labels:
    """Ways to cover the first blocks, by parameters, then damage."""

    parameters: NDArray[np.int64]
    damage: NDArray[np.float64]
    covered: NDArray[np.int64]
    """Blocks that the way covers before its last step."""
    step: NDArray[np.int64]
    """Its last step, among those that start at `covered`."""
    before: NDArray[np.int64]
    """The label there that it goes on from."""

    def __len__(self) -> int:
        return len(self.parameters)

    def only(self, kept: NDArray[np.intp] | NDArray[np.bool_]) -> _Labels:
        return _Labels(
            self.parameters[kept],
            self.damage[kept],
            self.covered[kept],
            self.step[kept],
            self.before[kept],
        )


@dataclass(frozen=True)
class _Price:
    """What a parameter costs in damage where the best plan just fits, and what that says."""

    parameter: float
    rest: NDArray[np.float64]
    """Least damage and priced parameters of the blocks from each on."""
    bound: float
    """No plan that fits does less damage."""
    fits: float
    """The damage of a plan that fits."""


def best_partitions(
    pieces: Pieces, teacher_blocks: int, outside: int, limit: int, count: int = 1
) -> list[Partition]:
    """The `count` partitions of least summed damage with at most `limit` parameters, best first.

    `outside` are the parameters that no piece holds. Fewer come back when fewer exist. Raises
    BudgetError when none fits, naming the smallest.
    """
    least = smallest(pieces, teacher_blocks, outside)
    if least > limit:
        raise BudgetError(
            f"no plan has at most {limit:,} parameters; the smallest reachable has {least:,}"
        )
    room = limit - outside
    steps = _steps(pieces, teacher_blocks, count)
    price = _price(steps, room)
    widest = sum(max((s.damage for s in starting), default=0.0) for starting in steps)
    margin = max((price.fits - price.bound) / 16, 1e-6 * widest)
    while True:
        labels = _forward(steps, room, count, price, margin)
        ends = labels[-1].only(np.lexsort((labels[-1].parameters, labels[-1].damage)))
        within = int((ends.damage <= price.bound + margin).sum())
        if within >= count or price.bound + margin >= widest:
            found = range(min(count, len(ends)))
            return [_partition(steps, labels, ends, i, outside) for i in found]
        margin *= 2


def budget_curve(pieces: Pieces, teacher_blocks: int, outside: int) -> list[Partition]:
    """The best partition at every size: each has less damage than all with fewer parameters."""
    smallest(pieces, teacher_blocks, outside)
    steps = _steps(pieces, teacher_blocks, 1)
    labels = _forward(steps, None, 1)
    ends = labels[-1]
    return [_partition(steps, labels, ends, i, outside) for i in range(len(ends))]


def smallest(pieces: Pieces, teacher_blocks: int, outside: int) -> int:
    """Parameters of the smallest student these pieces can make; BudgetError when they make none."""
    rest = _least_after(_steps(pieces, teacher_blocks, 1))[0]
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
    room = limit - outside
    mirrored = {_mirrored(b, teacher_blocks): piece for b, piece in pieces.items()}
    before = _forward(_steps(pieces, teacher_blocks, 1), room, 1)
    after = _forward(_steps(mirrored, teacher_blocks, 1), room, 1)
    through: dict[BlockPlan, float] = {}
    for block, piece in pieces.items():
        first, last = block.span
        heads, tails = before[first], after[teacher_blocks - 1 - last]
        if not len(heads) or not len(tails):
            continue
        # Survivors are sorted by parameters with falling damage: the largest that fits is best.
        left = room - heads.parameters - piece.parameters
        fitting = np.searchsorted(tails.parameters, left, side="right")
        some = fitting > 0
        if some.any():
            whole = heads.damage[some] + tails.damage[fitting[some] - 1]
            through[block] = float(whole.min()) + piece.damage
    return through


def _forward(
    steps: _Steps, room: int | None, count: int, price: _Price | None = None, margin: float = 0.0
) -> list[_Labels]:
    """Surviving labels by how many blocks they cover, each list sorted by parameters; with a price,
    only those that may end within the margin of its bound."""
    rest = _least_after(steps)
    reached = [_START]

    def hopeful(covered: int, parameters: NDArray[np.int64], damage: NDArray[np.float64]) -> _Mask:
        fits = parameters + rest[covered] <= (math.inf if room is None else room)
        if room is None or price is None:
            return fits
        total = damage + price.parameter * parameters + price.rest[covered]
        most = price.bound + price.parameter * room + margin
        return fits & (total <= most + 1e-9 * abs(most))

    for covered in range(1, len(steps) + 1):
        labels = _joined(list(_extended(steps, reached, covered, hopeful)))
        reached.append(_survivors(labels, count))
    return reached


def _extended(
    steps: _Steps,
    reached: list[_Labels],
    covered: int,
    hopeful: Callable[[int, NDArray[np.int64], NDArray[np.float64]], _Mask],
) -> Iterator[_Labels]:
    """Every hopeful label by one step, where that covers so many blocks."""
    for first, starting in enumerate(steps[:covered]):
        labels = reached[first]
        for number, step in enumerate(starting):
            if step.end == covered:
                parameters = labels.parameters + step.parameters
                damage = labels.damage + step.damage
                before = np.flatnonzero(hopeful(covered, parameters, damage))
                if len(before):
                    yield _Labels(
                        parameters[before],
                        damage[before],
                        np.full(len(before), first),
                        np.full(len(before), number),
                        before,
                    )


def _joined(parts: list[_Labels]) -> _Labels:
    if not parts:
        return _START.only(np.zeros(1, dtype=bool))
    return _Labels(
        np.concatenate([part.parameters for part in parts]),
        np.concatenate([part.damage for part in parts]),
        np.concatenate([part.covered for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.before for part in parts]),
    )


def _survivors(labels: _Labels, count: int) -> _Labels:
    """Those that fewer than `count` others match in both, peeled off front by front."""
    labels = labels.only(np.lexsort((labels.damage, labels.parameters)))
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
    """Least damage + price × parameters of the blocks from each on; of the whole plan that has the
    least, parameters and damage. Of equals the one with fewer parameters."""
    rest = np.full(len(steps) + 1, math.inf)
    size, damage = [0.0] * (len(steps) + 1), [0.0] * (len(steps) + 1)
    rest[-1] = 0.0
    for first in reversed(range(len(steps))):
        best = (math.inf, math.inf, 0.0)
        for step in steps[first]:
            cost = step.damage + price * step.parameters + rest[step.end]
            whole = step.parameters + size[step.end]
            if (cost, whole) < best[:2]:
                best = (cost, whole, step.damage + damage[step.end])
        rest[first], size[first], damage[first] = best
    return rest, size[0], damage[0]


def _smallest(steps: _Steps) -> tuple[float, float]:
    """Parameters and damage of the smallest plan; of equals the one of least damage."""
    best: list[tuple[float, float]] = [(math.inf, math.inf)] * len(steps) + [(0.0, 0.0)]
    for first in reversed(range(len(steps))):
        for step in steps[first]:
            size, damage = best[step.end]
            best[first] = min(best[first], (step.parameters + size, step.damage + damage))
    return best[0]


def _least_after(steps: _Steps) -> list[float]:
    """Least parameters of pieces that cover the blocks from each on; infinite where none do."""
    least = [math.inf] * len(steps) + [0.0]
    for first in reversed(range(len(steps))):
        sizes = (step.parameters + least[step.end] for step in steps[first])
        least[first] = min(sizes, default=math.inf)
    return least


def _steps(pieces: Pieces, teacher_blocks: int, count: int) -> _Steps:
    """The pieces by the block that they start at; of one span, those that fewer than `count` others
    match in both parameters and damage."""
    spans: dict[tuple[int, int], list[_Step]] = {}
    for block in _in_order(pieces):
        piece = pieces[block]
        step = _Step(block.span[1] + 1, piece.damage, piece.parameters, block)
        spans.setdefault(block.span, []).append(step)
    steps: _Steps = [[] for _ in range(teacher_blocks)]
    for (first, _), offered in spans.items():
        for at, step in enumerate(offered):
            matching = (
                other.parameters <= step.parameters
                and other.damage <= step.damage
                # Of equals the first in order matches the others.
                and (i < at or (other.parameters, other.damage) != (step.parameters, step.damage))
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
    damage, parameters = float(ends.damage[at]), outside + int(ends.parameters[at])
    blocks: list[BlockPlan] = []
    labels, covered = ends, len(steps)
    while covered:
        covered, number, before = (int(a[at]) for a in (labels.covered, labels.step, labels.before))
        blocks.append(steps[covered][number].block)
        labels, at = reached[covered], before
    return Partition(damage, parameters, tuple(reversed(blocks)))


_START = _Labels(
    np.zeros(1, dtype=np.int64),
    np.zeros(1),
    np.zeros(1, dtype=np.int64),
    np.zeros(1, dtype=np.int64),
    np.zeros(1, dtype=np.int64),
)
