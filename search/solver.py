"""The best partition under a budget, exactly: dynamic programming over the teacher's blocks.

A *piece* is one possible block of a student with what it costs: the damage it does alone, and its
parameters. Damages add up, which is an estimate; parameters add up exactly. A label stands for one
way to cover the first blocks; of labels at the same place only those survive that fewer than
`count` others match in both parameters and damage, so the `count` best whole plans are never lost.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from search.budget import BudgetError
from trainers.students.plan import BlockPlan

Pieces = Mapping[BlockPlan, "Piece"]


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


@dataclass(frozen=True, slots=True)
class _Label:
    parameters: int
    damage: float
    last: BlockPlan | None
    before: _Label | None


_START = _Label(0, 0.0, None, None)


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
    labels = _forward(pieces, teacher_blocks, limit - outside, count)
    ends = sorted(labels[teacher_blocks], key=lambda label: (label.damage, label.parameters))
    return [
        Partition(label.damage, outside + label.parameters, _blocks(label))
        for label in ends[:count]
    ]


def smallest(pieces: Pieces, teacher_blocks: int, outside: int) -> int:
    """Parameters of the smallest student these pieces can make; BudgetError when they make none."""
    rest = _least_after(pieces, teacher_blocks)[0]
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
    before = _forward(pieces, teacher_blocks, room, 1)
    after = _forward(mirrored, teacher_blocks, room, 1)
    through: dict[BlockPlan, float] = {}
    for block, piece in pieces.items():
        first, last = block.span
        heads = before[first]
        tails = after[teacher_blocks - 1 - last]
        sizes = [tail.parameters for tail in tails]
        best = math.inf
        for head in heads:
            # Survivors are sorted by parameters with falling damage: the largest that fits is best.
            fitting = bisect.bisect_right(sizes, room - head.parameters - piece.parameters)
            if fitting:
                best = min(best, head.damage + piece.damage + tails[fitting - 1].damage)
        if best < math.inf:
            through[block] = best
    return through


def _forward(pieces: Pieces, teacher_blocks: int, room: int, count: int) -> list[list[_Label]]:
    """Surviving labels by how many blocks they cover, each list sorted by parameters."""
    rest = _least_after(pieces, teacher_blocks)
    starting = _by_first(pieces, teacher_blocks)
    reached: list[list[_Label]] = [[] for _ in range(teacher_blocks + 1)]
    reached[0] = [_START]
    for covered in range(teacher_blocks + 1):
        reached[covered] = _survivors(reached[covered], count)
        if covered == teacher_blocks:
            break
        for block, piece in starting[covered]:
            end = block.span[1] + 1
            for label in reached[covered]:
                parameters = label.parameters + piece.parameters
                if parameters + rest[end] <= room:
                    damage = label.damage + piece.damage
                    reached[end].append(_Label(parameters, damage, block, label))
    return reached


def _survivors(labels: list[_Label], count: int) -> list[_Label]:
    labels.sort(key=lambda label: (label.parameters, label.damage))
    kept: list[_Label] = []
    lowest: list[float] = []  # the `count` lowest damages so far
    for label in labels:
        if len(lowest) < count or label.damage < lowest[-1]:
            kept.append(label)
            bisect.insort(lowest, label.damage)
            del lowest[count:]
    return kept


def _least_after(pieces: Pieces, teacher_blocks: int) -> list[float]:
    """Least parameters of pieces that cover the blocks from each on; infinite where none do."""
    least = [math.inf] * teacher_blocks + [0.0]
    starting = _by_first(pieces, teacher_blocks)
    for first in reversed(range(teacher_blocks)):
        sizes = (piece.parameters + least[block.span[1] + 1] for block, piece in starting[first])
        least[first] = min(sizes, default=math.inf)
    return least


def _by_first(pieces: Pieces, teacher_blocks: int) -> list[list[tuple[BlockPlan, Piece]]]:
    starting: list[list[tuple[BlockPlan, Piece]]] = [[] for _ in range(teacher_blocks)]
    for block in _in_order(pieces):
        starting[block.span[0]].append((block, Piece(*pieces[block])))
    return starting


def _in_order(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    # Ties between plans must not depend on the order in which a library was listed.
    return sorted(blocks, key=lambda b: (b.span, b.kept, b.start, b.text, b.text_map))


def _mirrored(block: BlockPlan, teacher_blocks: int) -> BlockPlan:
    first, last = block.span
    return block.model_copy(
        update={"span": (teacher_blocks - 1 - last, teacher_blocks - 1 - first)}
    )


def _blocks(label: _Label) -> tuple[BlockPlan, ...]:
    blocks: list[BlockPlan] = []
    while label.last is not None and label.before is not None:
        blocks.append(label.last)
        label = label.before
    return tuple(reversed(blocks))
