"""Plugging blocks back gives a student of its own plan, without training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.trainers.students.test_families import TINY, count, family, random_inputs, random_model
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, Plan, PlanError, identity_plan
from trainers.students.plug import plug, plugged_plan
from trainers.students.surgery import assemble

PLAN = Plan(
    family="qwen_image",
    teacher_blocks=6,
    blocks=(
        BlockPlan(span=(0, 1), start="average"),
        BlockPlan(span=(2, 2)),
        BlockPlan(span=(3, 4), ffn="linear", text="projected"),
        BlockPlan(span=(5, 5), ffn=0.5),
    ),
)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return random_model(identity_plan("qwen_image", 6))


def test_everything_plugged_back_is_the_teacher(teacher: nn.Module) -> None:
    student = assemble(teacher, PLAN)
    plan = plugged_plan(PLAN, [(0, 1), (3, 4), (5, 5)])
    assert plan == identity_plan("qwen_image", 6)
    whole = plug(student, PLAN, teacher, plan)
    inputs = random_inputs()
    assert torch.equal(family.forward(whole, inputs), family.forward(teacher, inputs))


def test_what_is_not_restored_stays_the_students(teacher: nn.Module) -> None:
    student = assemble(teacher, PLAN)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.25)  # as if all of it had been trained
    plan = plugged_plan(PLAN, [(3, 4)])
    larger = plug(student, PLAN, teacher, plan)
    assert [block.span for block in plan.blocks] == [(0, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert count(larger) == plan_parameters(plan, TINY)
    own, made = family.block_modules(student), family.block_modules(larger)
    theirs = family.block_modules(teacher)
    for block, source in zip(made, (own[0], own[1], theirs[3], theirs[4], own[3]), strict=True):
        for name, tensor in source.state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor)
    assert torch.equal(larger.proj_out.weight, student.proj_out.weight)


@pytest.mark.parametrize("span", [(2, 2), (0, 2), (4, 5)])
def test_a_span_that_nothing_replaces_is_named_with_those_that_are(span: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=rf"{span[0]}-{span[1]}.*it replaces 0-1, 3-4, 5-5"):
        plugged_plan(PLAN, [span])
