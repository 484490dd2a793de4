"""Memory of training: what grows with depth, and what must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import PeakMemory
from tests.trainers.students.tiny import QWEN_IMAGE, Tiny
from trainers.distilled import Distilled, Observed
from trainers.recovery import Example, backward, set_trainable
from trainers.schedule import PLAIN, Phase, StepConfig
from trainers.students.families.base import Inputs
from trainers.students.plan import BlockPlan, Plan, identity_plan

SPAN = Phase(loss="span", steps=1, lr=1e-3)
VELOCITY = Phase(loss="velocity", train="all", steps=1, lr=1e-3)
DEPTHS = (4, 8, 16)


def deep(blocks: int) -> tuple[Tiny, Plan]:
    """A teacher of so many blocks, and the student that has half of them."""
    tiny = replace(QWEN_IMAGE, config={**QWEN_IMAGE.config, "num_layers": blocks})
    pairs = tuple(BlockPlan(span=(i, i + 1)) for i in range(0, blocks, 2))
    return tiny, Plan(family=tiny.name, teacher_blocks=blocks, blocks=pairs)


def example() -> Example:
    generator = torch.Generator().manual_seed(0)
    noisy, clean, noise = torch.randn(3, 2, 64, 64, generator=generator)
    embeds = torch.randn(2, 4, 12, generator=generator)
    inputs = Inputs(noisy, torch.tensor([0.2, 0.9]), embeds, None, (8, 8))
    return Example(inputs, clean, noise)


def activations(blocks: int, phase: Phase, step: StepConfig = PLAIN) -> int:
    """The most bytes at a time beside weights and gradients."""
    tiny, plan = deep(blocks)
    teacher = tiny.model(identity_plan(tiny.name, blocks))
    student = Distilled(tiny.family, tiny.model(plan), plan, step)
    observed = Observed(tiny.family, teacher)
    set_trainable(student, phase)
    with PeakMemory() as memory:
        backward(student, observed, example(), phase, lambda value: value)
    gradients = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    return memory.peak - gradients


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_span_phase_takes_no_more_for_a_deeper_teacher(inputs: str) -> None:
    phase = SPAN.model_copy(update={"inputs": inputs})
    few, *more = (activations(blocks, phase) for blocks in DEPTHS)
    assert more == [few, few]


def test_a_whole_model_phase_takes_more() -> None:
    few, more, most = (activations(blocks, VELOCITY) for blocks in DEPTHS)
    assert most - more == pytest.approx(2 * (more - few), rel=0.01)
    assert more > 1.2 * few


@pytest.mark.parametrize("phase", [SPAN, VELOCITY], ids=["span", "velocity"])
def test_micro_batches_take_less(phase: Phase) -> None:
    whole, halves = (activations(4, phase, StepConfig(micro_batch=n)) for n in (2, 1))
    assert halves < 0.75 * whole


def test_checkpointing_keeps_only_what_enters_each_block() -> None:
    step = StepConfig(checkpointing=True)
    _, more, most = (activations(blocks, VELOCITY) for blocks in DEPTHS)
    _, less, least = (activations(blocks, VELOCITY, step) for blocks in DEPTHS)
    assert least - less < 0.2 * (most - more)
