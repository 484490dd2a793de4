"""How large a student is, from its plan alone: nothing is built and torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.students.families import family_named
from trainers.students.families.base import Config, check_plan
from trainers.students.plan import Plan


def plan_parameters(plan: Plan, config: Config) -> int:
    """Parameters of the student's transformer; `config` is the teacher's transformer config.

    PlanError when the plan is not for a teacher with this config.
    """
    family = family_named(plan.family)
    check_plan(family, config, plan)
    blocks = sum(family.block_parameters(config, block) for block in plan.blocks)
    return family.outside_parameters(config) + blocks


@dataclass(frozen=True)
class Memory:
    """Bytes for a transformer's parameters; activations come on top."""

    weights: int
    """To hold and run it."""
    training: int
    """To train all of it with AdamW: weights, gradients and two moments in the same dtype."""


def memory(parameters: int, bytes_each: int = 2) -> Memory:
    """`bytes_each`: 2 for bfloat16, 4 for float32."""
    weights = parameters * bytes_each
    return Memory(weights=weights, training=4 * weights)
