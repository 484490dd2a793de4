"""What a person reads off a plan or a schedule: a few numbers instead of a choice for each block.

The search itself sees a plan as numbers for every boundary, width, text and start
(search/space.py), dozens of them; no one can look at those side by side. These numbers decide
nothing, they show.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.schedule import Schedule
    from trainers.students.plan import Plan

PLAN_READING = (
    "Own blocks are the teacher’s, kept as they are; merge depth is where the merged ones lie on "
    "average, from the first block (0%) to the last (100%); untrained ones are cut from the "
    "teacher, and no replacement was trained for them."
)
"""What the names of a plan's features mean."""
SCHEDULE_READING = "Phases are numbered, and named by what they match; lr is the learning rate."
"""The same of a schedule's."""


def plan_features(plan: Plan) -> dict[str, int | float]:
    """Integers are counts, at most the teacher's blocks; the others are shares, in [0, 1], to four
    digits.

    `merge depth` is where the merged teacher blocks lie on average, 0 the first block and 1 the
    last; one half when none is merged.
    """
    merged = [i for b in plan.blocks if b.length > 1 for i in range(b.span[0], b.span[1] + 1)]
    last = max(plan.teacher_blocks - 1, 1)
    return {
        "blocks": len(plan.blocks),
        "own blocks": sum(block.untouched for block in plan.blocks),
        "longest span": max(block.length for block in plan.blocks),
        "merge depth": round(statistics.fmean(merged) / last, 4) if merged else 0.5,
        "FFN kept": round(statistics.fmean(block.kept for block in plan.blocks), 4),
        "text given up": sum(block.text != "dual" for block in plan.blocks),
        "untrained": sum(block.untrained for block in plan.blocks),
    }


def schedule_features(schedule: Schedule) -> dict[str, int | float]:
    """Optimizer steps and peak learning rate of every phase, by its place and what it matches."""
    found: dict[str, int | float] = {}
    for number, phase in enumerate(schedule.phases, start=1):
        found[f"{number} {phase.loss} steps"] = phase.steps
        found[f"{number} {phase.loss} lr"] = phase.lr
    return found
