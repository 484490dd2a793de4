"""The schedule of a recovery: its phases, and the space that a search draws schedules from."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from storage.section import Section

Loss = Literal["span", "velocity", "diffusion"]
Trained = Literal["replacements", "all"]
Number = TypeVar("Number", int, float)

NOTHING_REPLACED = (
    "the plan replaces no block, so there is no replacement to train; set train: all with another "
    "loss, or ask for a smaller budget"
)
"""What is wrong with a phase that trains replacements, and a plan of untouched blocks."""


class PhaseBase(Section):
    """What a phase and a space of phases share."""

    loss: Loss
    """What is matched, see trainers/losses.py. `span`: each replacement, fed the teacher's state
    before its span, matches the state after it. `velocity`: the whole student matches the
    teacher's velocity. `diffusion`: the data's own, without the teacher."""

    train: Trained = "replacements"
    """Which blocks move: those that replace something, or the whole student. The others hold no
    optimizer state."""

    batch_size: PositiveInt = 32
    """Pictures a step, over all workers; at least as many as they are."""

    warmup: NonNegativeInt = 8
    """Steps over which the learning rate rises linearly, before its cosine."""

    clip: PositiveFloat = 1.0
    """Gradient norm beyond which the gradient is scaled down."""

    magnitude: NonNegativeFloat = 1.0
    """Of `span` alone: weight of the relative squared error beside PPCL's loss, which is blind to
    magnitude."""

    inputs: Literal["teacher", "student"] = "teacher"
    """Of `span` alone: what a replacement is fed. `teacher`: the teacher's state before its span,
    as PPCL does, so that replacements do not depend on each other. `student`: what the student's
    own blocks before it make, one behind the other."""

    timestep_shift: PositiveFloat = 1.0
    """Above 1 training sees more noise, as schedulers do for large pictures."""

    reuse: PositiveInt = 1
    """Of `velocity` alone: in how many steps each noised batch is used; for all of them the teacher
    answers once. Batches come in groups of 8, each group so many times. With 2 a step of a
    half-size student takes a fifth less."""

    @model_validator(mode="after")
    def _loss_reaches_what_trains(self) -> Self:
        if self.loss == "span" and self.train == "all":
            raise ValueError(
                "loss `span` only reaches replacements; set train: replacements, or another loss"
            )
        return self

    @model_validator(mode="after")
    def _reuse_saves(self) -> Self:
        if self.loss != "velocity" and self.reuse > 1:
            raise ValueError(f"loss `{self.loss}` has no answers to use again; set reuse: 1")
        return self


class Phase(PhaseBase):
    """One part of a recovery, with an optimizer of its own."""

    steps: PositiveInt
    """Optimizer steps, not images."""

    lr: PositiveFloat
    """Highest learning rate."""


class Schedule(Section):
    """How one finalist is recovered."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """One after the other."""

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)


class StepConfig(Section):
    """How an optimizer step is taken, whatever the phase."""

    micro_batch: PositiveInt | None = None
    """Pictures that a worker passes through the models at a time; their gradients add up to the
    batch's; one more where workers have unequally many. None takes all of a worker's at once."""

    checkpointing: bool = False
    """Whether phases that train through the whole student keep only what enters each block, and
    run the block again on the way back: less memory, about a third more time. A `span` phase never
    holds more than one block's graph."""

    compile: bool = False
    """Whether blocks are compiled (torch.compile), once for all that are alike."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits, a quarter of the memory; it needs torchao. Where
    another number of workers goes on, they are the same to 8 bits, not exactly."""

    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of itself that a moving average of the student's weights keeps at each step, such as
    0.999, less at first; the average is what is measured and published. None keeps none."""

    spike: Annotated[float, Field(gt=1)] | None = 10.0
    """A loss so many times the median of the steps before it is a spike, which is answered as one
    that is not finite. None lets spikes pass."""

    rollbacks: NonNegativeInt = 2
    """How often a recovery goes back to its latest checkpoint after such a loss, and on at half the
    rate; to the one before it when it has not come to another meanwhile. Then a loss that is not
    finite ends it, and spikes pass."""

    @field_validator("optimizer")
    @classmethod
    def _there(cls, optimizer: str) -> str:
        if optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                "adamw8bit needs torchao, which is not installed; run pip install -e "
                "'.[8bit]' in your clone, or set adamw"
            )
        return optimizer


PLAIN = StepConfig()
"""A step without any of it."""


def _ends(value: object) -> object:
    """One number is a range that holds only itself."""
    return (value, value) if isinstance(value, int | float) else value


def _rising(ends: tuple[Number, Number]) -> tuple[Number, Number]:
    low, high = ends
    if low > high:
        raise ValueError(f"[{low}, {high}] is reversed; write the lower end first")
    return ends


class PhaseSpace(PhaseBase):
    """The phases that a search may choose among: a range of lengths and one of rates."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_ends)]
    """Fewest and most optimizer steps; one number fixes them."""

    lr: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(_ends)]
    """Lowest and highest peak of the learning rate; one number fixes it."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        _rising(self.steps)
        _rising(self.lr)
        return self


class ScheduleSpace(Section):
    """The schedules that a search may choose among."""

    phases: Annotated[tuple[PhaseSpace, ...], Field(min_length=1)] = (
        PhaseSpace(loss="span", steps=(40, 80), lr=(5e-4, 2e-3)),
        PhaseSpace(loss="velocity", train="all", steps=(100, 200), lr=(5e-4, 2e-3)),
        PhaseSpace(loss="diffusion", train="all", steps=(10, 30), lr=(5e-5, 2e-4)),
    )
    """One after the other; each phase's length and rate is searched within its ranges."""

    def ranges(self) -> dict[str, tuple[int, int] | tuple[float, float]]:
        """What there is to choose, by name: integer ranges are lengths, the others rates."""
        named: dict[str, tuple[int, int] | tuple[float, float]] = {}
        for i, phase in enumerate(self.phases):
            named[f"phases[{i}].steps"] = phase.steps
            named[f"phases[{i}].lr"] = phase.lr
        return named

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return all(low == high for low, high in self.ranges().values())

    def middle(self) -> dict[str, float]:
        """The choice in the middle of every range, on a logarithmic scale."""
        chosen: dict[str, float] = {}
        for name, (low, high) in self.ranges().items():
            mean = math.sqrt(low * high)
            chosen[name] = round(mean) if isinstance(low, int) else min(max(mean, low), high)
        return chosen

    def schedule(self, choice: Mapping[str, float]) -> Schedule:
        """The schedule of one choice, named as in `ranges`."""
        shared = set(PhaseBase.model_fields)
        return Schedule(
            phases=tuple(
                Phase(
                    **phase.model_dump(include=shared),
                    steps=int(choice[f"phases[{i}].steps"]),
                    lr=choice[f"phases[{i}].lr"],
                )
                for i, phase in enumerate(self.phases)
            )
        )
