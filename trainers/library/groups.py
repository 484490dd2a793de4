"""Which replacements are trained together, and what a step of a group takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from trainers.students.plan import BlockPlan


def grouped(blocks: Sequence[BlockPlan], workers: int, largest: int) -> list[list[BlockPlan]]:
    """Groups of equal size, as few as keep all workers busy, none above `largest`.

    Blocks are dealt out by the end of their span: a group's teacher pass ends at its last span.
    """
    per_worker = math.ceil(len(blocks) / workers)
    rounds = math.ceil(per_worker / largest)
    count = min(len(blocks), workers * rounds)
    ordered = sorted(blocks, key=lambda b: (b.span[1], b.span[0], b.kept, b.text))
    edges = [i * len(ordered) // count for i in range(count + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(edges)]


def work(group: Sequence[BlockPlan]) -> int:
    """Of a step, in passes through a block: the teacher's up to the last span, and forth and back
    (twice a pass) through each replacement."""
    return max(block.span[1] + 1 for block in group) + 3 * len(group)
