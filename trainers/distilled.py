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
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from trainers.schedule import PLAIN, StepConfig
from trainers.students.families.base import Context, Family, Inputs, State
from trainers.students.plan import BlockPlan, Plan

_VARIANTS = 64
"""Of compiled blocks, which share one piece of code: by torch's own limit of 8 they would run
uncompiled before the second phase is reached. Qwen-Image's have 15 in a span phase and a velocity
phase after it, 21 when the student has two widths: teacher and student, the first block and later
ones, with a mask and without, captions of one length and of any."""


class Placed(NamedTuple):
    """One block of the student."""

    place: int
    """Its number in the student."""
    block: BlockPlan


class Distilled(nn.Module):
    """A student in training."""

    def __init__(
        self, family: Family, student: nn.Module, plan: Plan, step: StepConfig = PLAIN
    ) -> None:
        super().__init__()
        self.family = family
        self.student = student
        self.step = step
        self.average: dict[str, Tensor] | None = None
        """The moving average of the weights, by parameter and sharded like it."""
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
        state, context = self.family.begin(self.student, inputs)
        if place is not None:
            return self.family.run_block(self.blocks[place], before or state, context)
        for block in self.blocks:
            state = self._run(block, state, context)
        return self.family.end(self.student, state, context)

    def _run(self, block: nn.Module, state: State, context: Context) -> State:
        if not self.step.checkpointing or not torch.is_grad_enabled():
            return self.family.run_block(block, state, context)
        return cast(
            "State",
            checkpoint(
                self.family.run_block, block, state, context,
                use_reentrant=False, preserve_rng_state=False,
            ),
        )  # fmt: skip

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Moves the average towards the weights, as they are after `steps` steps of all."""
        if self.step.average is None:
            return
        weights = {name: local(p) for name, p in self.named_parameters()}
        if self.average is None:
            self.average = {name: p.detach().clone() for name, p in self.named_parameters()}
        # A young average would still be made of the first weights.
        kept = min(self.step.average, (1 + steps) / (10 + steps))
        averages = [local(tensor) for tensor in self.average.values()]
        torch._foreach_lerp_(averages, list(weights.values()), 1 - kept)

    @torch.no_grad()
    def become_average(self) -> None:
        """Puts the average in the place of the weights; training does not go on from there."""
        for name, parameter in self.named_parameters():
            if self.average is not None:
                local(parameter).copy_(local(self.average[name]))


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
        state, context = self.family.begin(self.teacher, inputs)
        if visit is not None:
            visit(0, state)
        for i, block in enumerate(islice(self.blocks, last)):
            state = self.family.run_block(block, state, context)
            if visit is not None:
                visit(i + 1, state)
        return None if visit else self.family.end(self.teacher, state, context)


def compile_blocks(module: Distilled | Observed, backend: str = "inductor") -> None:
    """Compiles the blocks, those that are alike once; before the model is sharded."""
    for block in module.blocks:
        # Torch's setting of the same name is one thread's, and a GPU's backward pass, which runs
        # checkpointed blocks again, has a thread of its own.
        block.forward = torch.compile(block.forward, backend=backend, recompile_limit=_VARIANTS)  # type: ignore[call-overload]  # the overloads do not list it


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Called:
    """Runs a model that is a `Distilled` or an `Observed`, where a family runs a bare one."""

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Its velocity_BNC."""
        return cast("Tensor", model(inputs))


CALLED = Called()
