"""A family runs a model block by block exactly as the model runs itself, and counts it exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests.trainers.students.test_plan import plans
from trainers.students.counts import memory, plan_parameters
from trainers.students.families import FAMILIES, family_named, family_of
from trainers.students.families.base import FamilyError, Inputs
from trainers.students.plan import BlockPlan, Plan, identity_plan

QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
"""transformer/config.json of Qwen/Qwen-Image."""

TINY: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 8,
    "axes_dims_rope": [4, 2, 2],
    "joint_attention_dim": 12,
    "num_attention_heads": 2,
    "num_layers": 6,
}

family = FAMILIES["qwen_image"]


def random_model(plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    model = family.build(TINY, plan)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def random_inputs(padded: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if padded else None
    return Inputs(
        noisy_BNC=torch.randn(2, 6, 64, generator=generator),
        timestep_B=torch.tensor([0.2, 0.9]),
        embeds_BMD=torch.randn(2, 5, 12, generator=generator),
        mask_BM=mask,
        grid=(2, 3),
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


CUT = Plan(
    family="qwen_image",
    teacher_blocks=6,
    blocks=(BlockPlan(span=(0, 2), ffn=0.5), BlockPlan(span=(3, 5))),
)


@pytest.mark.parametrize("plan", [identity_plan("qwen_image", 6), CUT], ids=["stock", "pruned"])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_run_one_by_one_equal_the_models_own_forward(plan, padded):
    model, inputs = random_model(plan), random_inputs(padded)
    state, context = family.begin(model, inputs)
    for block in family.block_modules(model):
        state = family.run_block(block, state, context)
    chained = family.end(model, state, context)
    assert chained.shape == (2, 6, 64)
    assert torch.equal(chained, family.forward(model, inputs))


def test_padding_does_not_reach_the_velocity():
    model, inputs = random_model(identity_plan("qwen_image", 6)), random_inputs()
    changed = inputs.embeds_BMD.clone()
    changed[1, 3:] = 7.0
    other = Inputs(inputs.noisy_BNC, inputs.timestep_B, changed, inputs.mask_BM, inputs.grid)
    torch.testing.assert_close(family.forward(model, inputs), family.forward(model, other))


def test_the_real_teacher_has_20_430_401_088_parameters():
    plan = identity_plan("qwen_image", 60)
    assert plan_parameters(plan, QWEN_IMAGE) == 20_430_401_088
    assert count(family.build(QWEN_IMAGE, plan, "meta")) == 20_430_401_088
    assert family.outside_parameters(QWEN_IMAGE) == 40_523_328
    assert family.block_parameters(QWEN_IMAGE, BlockPlan(span=(0, 0))) == 339_831_296


def test_a_real_width_cut_student_counts_as_it_is_built():
    blocks = (BlockPlan(span=(0, 29), ffn=0.3), BlockPlan(span=(30, 59)))
    plan = Plan(family="qwen_image", teacher_blocks=60, blocks=blocks)
    assert count(family.build(QWEN_IMAGE, plan, "meta")) == plan_parameters(plan, QWEN_IMAGE)


@given(plans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_plan_counts_as_it_is_built(plan):
    model = family.build(TINY, plan, "meta")
    assert count(model) == plan_parameters(plan, TINY)
    assert type(model).__name__ == family.student_class(plan)[1]
    for module, block in zip(family.block_modules(model), plan.blocks, strict=True):
        alone = family.build_block(TINY, block, "meta")
        assert count(alone) == family.block_parameters(TINY, block)
        assert {k: v.shape for k, v in alone.state_dict().items()} == {
            k: v.shape for k, v in module.state_dict().items()
        }


def test_build_takes_dtype_and_leaves_nothing_on_meta():
    model = family.build(TINY, CUT, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def test_memory_counts_weights_gradients_and_moments():
    assert memory(10).weights == 20
    assert memory(10).training == 80
    assert memory(10, bytes_each=4).weights == 40


def test_family_of_names_the_unknown_class_and_the_file():
    with pytest.raises(FamilyError, match=r"x/config.json.*FluxTransformer.*QwenImage"):
        family_of({"_class_name": "FluxTransformer2DModel"}, "x/config.json")


def test_editing_variants_are_refused():
    with pytest.raises(FamilyError, match="zero_cond_t"):
        family_of({**QWEN_IMAGE, "zero_cond_t": True})


def test_family_named_names_the_known():
    assert family_named("qwen_image") is family_of(QWEN_IMAGE)
    with pytest.raises(FamilyError, match=r"'flux'.*qwen_image"):
        family_named("flux")
