"""Plugs teacher blocks back into a student: replacements are swapped out without any training.

PPCL's models of several sizes from one distillation (arXiv 2511.16156, plug-and-play).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from trainers.students.families import family_named
from trainers.students.families.base import Config
from trainers.students.plan import BlockPlan, Plan, PlanError

Span = tuple[int, int]


def plugged_plan(plan: Plan, restored: Sequence[Span]) -> Plan:
    """The plan with the teacher's own blocks at `restored`; PlanError names a span that is none of
    the plan's replacements."""
    replaced = [block.span for block in plan.blocks if not block.untouched]
    for span in restored:
        if span not in replaced:
            known = ", ".join(f"{first}-{last}" for first, last in replaced) or "none"
            raise PlanError(
                f"span {span[0]}-{span[1]}: the student replaces no such span; it replaces {known}"
            )
    blocks: list[BlockPlan] = []
    for block in plan.blocks:
        if block.span in restored:
            first, last = block.span
            blocks += [BlockPlan(span=(i, i)) for i in range(first, last + 1)]
        else:
            blocks.append(block)
    return Plan(family=plan.family, teacher_blocks=plan.teacher_blocks, blocks=tuple(blocks))


def plug(student: nn.Module, plan: Plan, teacher: nn.Module, plugged: Plan) -> nn.Module:
    """The student of `plugged`, a plan from `plugged_plan`: teacher blocks where it restores them,
    everything else the student's, of which it shares the tensors."""
    family = family_named(plan.family)
    config: Config = dict(cast("Any", teacher).config)
    prefixes = family.block_prefixes(config, plan)
    own, theirs = family.block_modules(student), family.block_modules(teacher)
    place = {block: i for i, block in enumerate(plan.blocks)}
    tensors: dict[str, Tensor] = {
        name: t for name, t in student.state_dict().items() if not name.startswith(prefixes)
    }
    for prefix, block in zip(family.block_prefixes(config, plugged), plugged.blocks, strict=True):
        source = own[place[block]] if block in place else theirs[block.span[0]]
        tensors |= {f"{prefix}{name}": t for name, t in source.state_dict().items()}
    built = family.build(config, plugged, "meta")
    built.load_state_dict(tensors, assign=True)
    return built
