"""Qwen-Image's own: its published sizes, its padding, its variants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.trainers.students.tiny import QWEN_IMAGE, count
from trainers.students.counts import plan_parameters
from trainers.students.families import family_of
from trainers.students.families.base import FamilyError
from trainers.students.plan import BlockPlan, Plan, identity_plan

family = QWEN_IMAGE.family
PUBLISHED = family.published


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ({}, 339_831_296),
        ({"ffn": "linear"}, 151_044_608),
        ({"text": "projected", "text_map": True}, 226_557_440),
        ({"text": "projected"}, 217_117_184),
        ({"text": "projected", "ffn": "linear"}, 122_723_840),
        ({"text": "shared"}, 169_915_648),
    ],
)
def test_real_blocks_count_as_published(variant, parameters):
    block = BlockPlan(span=(5, 5), **variant)
    assert family.block_parameters(PUBLISHED, block) == parameters
    assert count(family.build_block(PUBLISHED, block, "meta")) == parameters


def test_the_real_teacher_has_20_430_401_088_parameters():
    assert plan_parameters(identity_plan("qwen_image", 60), PUBLISHED) == 20_430_401_088
    assert family.outside_parameters(PUBLISHED) == 40_523_328


def test_a_real_width_cut_student_counts_as_it_is_built():
    blocks = (BlockPlan(span=(0, 29), ffn=0.3), BlockPlan(span=(30, 59)))
    plan = Plan(family="qwen_image", teacher_blocks=60, blocks=blocks)
    assert count(family.build(PUBLISHED, plan, "meta")) == plan_parameters(plan, PUBLISHED)


def test_padding_does_not_reach_the_velocity():
    model, inputs = QWEN_IMAGE.model(), QWEN_IMAGE.inputs()
    changed = inputs.embeds_BMD.clone()
    changed[1, 3:] = 7.0
    other = replace(inputs, embeds_BMD=changed)
    torch.testing.assert_close(family.forward(model, inputs), family.forward(model, other))


def test_editing_variants_are_refused():
    with pytest.raises(FamilyError, match="zero_cond_t"):
        family_of({**PUBLISHED, "zero_cond_t": True})
