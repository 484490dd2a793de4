"""Going back from a loss that is not finite, or a spike: to where, at which rate, how often."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from tests.trainers.recovering import FAMILY, PLAN, make_latents, make_teacher
from trainers.data.latents import Latents
from trainers.distilled import Distilled, Observed
from trainers.recovery import (
    Example,
    LossSpikeError,
    NanLossError,
    Position,
    Start,
    examples_of,
    held_tensors,
    recover,
    recover_steadily,
    restore_weights,
)
from trainers.schedule import Phase, Schedule, StepConfig
from trainers.students.surgery import assemble

START = Position()
LONG = Schedule(
    phases=(Phase(loss="diffusion", train="all", steps=40, lr=1e-3, batch_size=4, warmup=1),)
)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return make_teacher()


@pytest.fixture(scope="module")
def latents() -> Latents:
    return make_latents()


@dataclass
class Fragile:
    """A recovery that keeps a checkpoint every ten steps, whose data is bad at one step."""

    teacher: nn.Module
    latents: Latents
    factor: float
    """What the bad pictures are multiplied by."""
    times: int
    """How often they come; after that they are mended."""
    bad: int = 25
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    kept: Start = field(default_factory=lambda: Start(Position()))

    def go(self, step: StepConfig) -> Fragile:
        self.student = Distilled(FAMILY, assemble(self.teacher, PLAN), PLAN, step)
        self.first = held_tensors(self.student, None)
        self.first = {name: tensor.clone() for name, tensor in self.first.items()}
        recover_steadily(self.run, self.kept, self.go_back, step, self.said.append)
        return self

    def run(self, start: Start, rate: float, spike: float | None) -> None:
        self.starts.append(start.at.step)
        self.rates.append(rate)
        recover(
            self.student, Observed(FAMILY, self.teacher), self.examples, LONG, start.at,
            past=start.losses, rate=rate, spike=spike, optimizer_tensors=start.optimizer_tensors,
            save=self.save, report=lambda _, loss: self.losses.append(loss),
        )  # fmt: skip

    def examples(self, phase: int, settings: Phase, start: int) -> Iterator[Example]:
        source = examples_of(self.latents, seed=3)(phase, settings, start)
        for step, example in enumerate(source, start):
            if step == self.bad and self.times:
                self.times -= 1
                example = replace(example, noise_BNC=example.noise_BNC * self.factor)
            yield example

    def save(self, at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        if at.step and at.step % 10 == 0:
            held = {k: v.clone() for k, v in held_tensors(student, optimizer).items()}
            self.kept = Start(at, tuple(self.losses), held)

    def go_back(self) -> Start:
        self.losses[:] = self.kept.losses
        held = self.kept.optimizer_tensors
        restore_weights(self.student, held or self.first)
        # Who goes on takes them out, and training may come back here once more.
        again = held and {name: tensor.clone() for name, tensor in held.items()}
        return replace(self.kept, optimizer_tensors=again)


NAN = float("nan")


def test_a_run_that_went_back_before_it_was_cut_off_goes_on_at_its_lower_rate() -> None:
    seen: list[tuple[int, float, bool]] = []

    def run(start: Start, rate: float, spike: float | None) -> None:
        seen.append((start.rollbacks, rate, spike is not None))
        if len(seen) == 1:
            raise LossSpikeError("once more")

    recover_steadily(run, Start(START, rollbacks=1), lambda: Start(START), StepConfig(rollbacks=2))
    assert seen == [(1, 0.5, True), (2, 0.25, False)]


def test_a_loss_that_is_not_finite_is_gone_back_from(teacher: nn.Module, latents: Latents) -> None:
    run = Fragile(teacher, latents, factor=NAN, times=1).go(StepConfig())
    assert (run.starts, run.rates) == ([0, 20], [1.0, 0.5])
    assert len(run.losses) == LONG.steps
    assert all(math.isfinite(loss) for loss in run.losses)
    assert ["step 25" in reason for reason in run.said] == [True]


def test_before_the_first_checkpoint_it_goes_back_to_the_start(
    teacher: nn.Module, latents: Latents
) -> None:
    run = Fragile(teacher, latents, factor=NAN, times=1, bad=3).go(StepConfig())
    assert (run.starts, run.rates) == ([0, 0], [1.0, 0.5])
    assert len(run.losses) == LONG.steps


def test_going_back_is_bounded(teacher: nn.Module, latents: Latents) -> None:
    run = Fragile(teacher, latents, factor=NAN, times=99)
    with pytest.raises(NanLossError, match="step 25"):
        run.go(StepConfig(rollbacks=2))
    assert run.starts == [0, 20, 20]


def test_a_spike_is_gone_back_from_and_passes_in_the_end(
    teacher: nn.Module, latents: Latents
) -> None:
    calm = Fragile(teacher, latents, factor=1e3, times=0).go(StepConfig(spike=3))
    assert calm.starts == [0]
    run = Fragile(teacher, latents, factor=1e3, times=1).go(StepConfig(spike=3))
    assert (run.starts, run.rates) == ([0, 20], [1.0, 0.5])
    assert "over 3 times the median" in run.said[0]
    stubborn = Fragile(teacher, latents, factor=1e3, times=99).go(StepConfig(spike=3, rollbacks=1))
    assert stubborn.starts == [0, 20]
    assert len(stubborn.losses) == LONG.steps
