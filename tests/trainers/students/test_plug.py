"""Plugging blocks back gives a student of its own plan, without training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.trainers.students.tiny import QWEN_IMAGE, Tiny, count
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, Plan, PlanError
from trainers.students.plug import plug, plugged_plan
from trainers.students.surgery import assemble


def plan_of(tiny: Tiny) -> Plan:
    return tiny.plan(
        BlockPlan(span=(0, 1), start="average"),
        BlockPlan(span=(2, 2), ffn="linear", text="projected"),
        BlockPlan(span=(3, 4)),
        BlockPlan(span=(5, 5), ffn=0.5),
    )


@pytest.fixture(scope="module")
def teacher(tiny: Tiny) -> nn.Module:
    return tiny.model()


def test_everything_plugged_back_is_the_teacher(tiny: Tiny, teacher: nn.Module) -> None:
    plan = plan_of(tiny)
    student = assemble(teacher, plan)
    larger = plugged_plan(plan, [(0, 1), (2, 2), (3, 4), (5, 5)])
    assert larger == tiny.identity
    whole = plug(student, plan, teacher, larger)
    inputs = tiny.inputs()
    assert torch.equal(tiny.family.forward(whole, inputs), tiny.family.forward(teacher, inputs))


def test_what_is_not_restored_stays_the_students(tiny: Tiny, teacher: nn.Module) -> None:
    family, plan = tiny.family, plan_of(tiny)
    student = assemble(teacher, plan)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.25)  # as if all of it had been trained
    fuller = plugged_plan(plan, [(3, 4)])
    larger = plug(student, plan, teacher, fuller)
    assert [block.span for block in fuller.blocks] == [(0, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert count(larger) == plan_parameters(fuller, tiny.config)
    own, made = family.block_modules(student), family.block_modules(larger)
    theirs = family.block_modules(teacher)
    for block, source in zip(made, (own[0], own[1], theirs[3], theirs[4], own[3]), strict=True):
        for name, tensor in source.state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor)
    assert torch.equal(larger.proj_out.weight, student.proj_out.weight)


@pytest.mark.parametrize("span", [(1, 1), (0, 2), (4, 5)])
def test_a_span_that_nothing_replaces_is_named_with_those_that_are(span: tuple[int, int]) -> None:
    words = rf"{span[0]}-{span[1]}.*it replaces 0-1, 2-2, 3-4, 5-5"
    with pytest.raises(PlanError, match=words):
        plugged_plan(plan_of(QWEN_IMAGE), [span])
