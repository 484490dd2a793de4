"""Which replacements are made together, and what that takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from trainers.library.config import TrainingConfig
from trainers.students.plan import BlockPlan


def grouped(blocks: Sequence[BlockPlan], workers: int, largest: int) -> list[list[BlockPlan]]:
    """Groups of equal size, as few as keep all workers busy, none above `largest`; those that are
    trained first, and apart from those that are only measured.

    Blocks are dealt out by the end of their span: a group's teacher pass ends at its last span.
    """
    trained = [block for block in blocks if not block.untrained]
    measured = [block for block in blocks if block.untrained]
    return [
        group for kind in (trained, measured) if kind for group in _dealt(kind, workers, largest)
    ]


def _dealt(blocks: Sequence[BlockPlan], workers: int, largest: int) -> list[list[BlockPlan]]:
    per_worker = math.ceil(len(blocks) / workers)
    rounds = math.ceil(per_worker / largest)
    count = min(len(blocks), workers * rounds)
    ordered = sorted(blocks, key=lambda b: (b.span[1], b.span[0], b.kept, b.text, b.start))
    edges = [i * len(ordered) // count for i in range(count + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(edges)]


def steps_of(block: BlockPlan, config: TrainingConfig) -> int:
    """Optimizer steps that a replacement takes; none where it is only measured."""
    return 0 if block.untrained else config.steps


def work(group: Sequence[BlockPlan]) -> int:
    """Of a step, in passes through a block: the teacher's up to the last span, and forth and back
    (twice a pass) through each replacement. 0 for a group that takes no steps."""
    if group[0].untrained:
        return 0
    return max(block.span[1] + 1 for block in group) + 3 * len(group)
