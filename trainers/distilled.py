"""Student and teacher as modules whose every use is one call of `forward`.

`fully_shard` gathers parameters around a module's `forward` and nowhere else; so whatever recovery
wants of a model goes through the forward of the module that was sharded as the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from trainers.students.families.base import Family, Inputs, State
from trainers.students.plan import BlockPlan, Plan


class Placed(NamedTuple):
    """One block of the student."""

    place: int
    """Its number in the student."""
    block: BlockPlan


class Distilled(nn.Module):
    """A student in training."""

    def __init__(self, family: Family, student: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.family = family
        self.student = student
        self.placed = tuple(Placed(i, block) for i, block in enumerate(plan.blocks))
        """The student's blocks on paper, in order."""
        self.replaced = tuple(placed for placed in self.placed if not placed.block.untouched)
        """Those that are not simply the teacher's."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The student's blocks, in order."""
        return self.family.block_modules(self.student)

    def forward(
        self, inputs: Inputs, place: int | None = None, before: State | None = None
    ) -> Tensor | State:
        """The student's velocity_BNC; or the state after its block number `place`, of which
        `before` is the state before it, the student's first when None."""
        if place is None:
            return self.family.forward(self.student, inputs)
        state, context = self.family.begin(self.student, inputs)
        return self.family.run_block(self.blocks[place], before or state, context)


def detached(state: State) -> State:
    """The same state, through which no gradient flows."""
    return State(*(None if part is None else part.detach() for part in state))  # type: ignore[arg-type]  # only modulated_BMD is ever None


def joined(states: Sequence[State]) -> State:
    """The state of a batch from its parts, in order."""
    parts = zip(*states, strict=True)
    return State(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]  # as above


class Visit(Protocol):
    """Sees the teacher's states one by one, on its way through the blocks."""

    def __call__(self, edge: int, state: State) -> None:
        """`state` is the one before block number `edge`, or after the last."""


class Observed(nn.Module):
    """A frozen teacher and what is read off it."""

    def __init__(self, family: Family, teacher: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.teacher = teacher.requires_grad_(False).eval()

    @property
    def blocks(self) -> nn.ModuleList:
        """The teacher's blocks, in order."""
        return self.family.block_modules(self.teacher)

    @torch.no_grad()
    def forward(
        self, inputs: Inputs, visit: Visit | None = None, last: int | None = None
    ) -> Tensor | None:
        """The teacher's velocity_BNC; or nothing, but `visit` is shown each state up to the one
        before block `last`, and none is kept."""
        if visit is None:
            return self.family.forward(self.teacher, inputs)
        state, context = self.family.begin(self.teacher, inputs)
        visit(0, state)
        for i, block in enumerate(islice(self.blocks, last)):
            state = self.family.run_block(block, state, context)
            visit(i + 1, state)
        return None


class Called:
    """Runs a model that is a `Distilled` or an `Observed`, where a family runs a bare one."""

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Its velocity_BNC."""
        return cast("Tensor", model(inputs))


CALLED = Called()
