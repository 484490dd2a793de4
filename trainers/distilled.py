"""Student and teacher as modules whose every use is one call of `forward`.

`fully_shard` gathers parameters around a module's `forward` and nowhere else; so whatever recovery
wants of a model goes through the forward of the module that was sharded as the root.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainers.library.train import teacher_states
from trainers.students.families.base import Family, Inputs, State
from trainers.students.plan import BlockPlan, Plan


class Replaced(NamedTuple):
    """One block of the student that is not simply the teacher's."""

    place: int
    """Its number in the student."""
    block: BlockPlan


class Distilled(nn.Module):
    """A student in training."""

    def __init__(self, family: Family, student: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.family = family
        self.student = student
        self.replaced: tuple[Replaced, ...] = tuple(
            Replaced(i, block) for i, block in enumerate(plan.blocks) if not block.untouched
        )
        """The blocks that replace something, in order."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The student's blocks, in order."""
        return self.family.block_modules(self.student)

    def forward(
        self, inputs: Inputs, before: Sequence[State] | Literal["own"] | None = None
    ) -> Tensor | tuple[State, ...]:
        """The student's velocity_BNC; or the states after each block in `replaced`: run on its own
        from the teacher's state before its span, or with "own" one behind the other, each from what
        the student's blocks before it make, through which no gradient flows."""
        if before is None:
            return self.family.forward(self.student, inputs)
        state, context = self.family.begin(self.student, inputs)
        if before == "own":
            places, after = {replaced.place for replaced in self.replaced}, []
            for place, block in enumerate(self.blocks):
                state = self.family.run_block(block, detached(state), context)
                if place in places:
                    after.append(state)
            return tuple(after)
        return tuple(
            self.family.run_block(self.blocks[replaced.place], state, context)
            for replaced, state in zip(self.replaced, before, strict=True)
        )


def detached(state: State) -> State:
    """The same state, through which no gradient flows."""
    return State(*(None if part is None else part.detach() for part in state))  # type: ignore[arg-type]  # only modulated_BMD is ever None


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
        self, inputs: Inputs, edges: Collection[int] | None = None
    ) -> Tensor | dict[int, State]:
        """The teacher's velocity_BNC; or its states before each block in `edges`, where the number
        of blocks stands for the state after the last."""
        if edges is None:
            return self.family.forward(self.teacher, inputs)
        return teacher_states(self.teacher, self.family, inputs, edges).states
