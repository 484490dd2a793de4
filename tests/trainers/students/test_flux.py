"""FLUX.1's own: two kinds of blocks, FFNs fused with attention, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from search.space import candidates
from tests.trainers.students.tiny import FLUX, count
from trainers.students.counts import plan_parameters
from trainers.students.families import family_of
from trainers.students.families.base import FamilyError
from trainers.students.plan import BlockPlan, PlanError, identity_plan, uniform_plan
from trainers.students.surgery import assemble, make_block

family = FLUX.family
PUBLISHED = family.published


@pytest.fixture(scope="module")
def teacher():
    return FLUX.model()


@pytest.mark.parametrize(
    ("span", "variant", "parameters"),
    [
        ((18, 18), {}, 339_831_296),
        ((18, 18), {"ffn": "linear"}, 151_044_608),
        ((18, 18), {"text": "shared"}, 169_915_648),
        ((19, 19), {}, 141_591_808),
        ((19, 19), {"ffn": 0.5}, 103_836_928),
    ],
)
def test_real_blocks_count_as_they_are_built(span, variant, parameters):
    block = BlockPlan(span=span, **variant)
    assert family.block_parameters(PUBLISHED, block) == parameters
    assert count(family.build_block(PUBLISHED, block, "meta")) == parameters


def test_the_real_teacher_has_11_901_408_320_parameters():
    assert plan_parameters(identity_plan("flux", 57), PUBLISHED) == 11_901_408_320
    distilled = {**PUBLISHED, "guidance_embeds": False}  # FLUX.1-schnell
    assert plan_parameters(identity_plan("flux", 57), distilled) == 11_891_178_560


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([{"span": (0, 1)}, {"span": (2, 3)}, {"span": (4, 5)}], r"block 1: span \[2, 3\] crosses"),
        ([{"span": (0, 5)}], r"block 0: span \[0, 5\] .*dual.* 0 to 2, .*single blocks, 3 to 5"),
        ([{"span": (0, 2)}, {"span": (3, 5), "ffn": "linear"}], r"block 1: .* ffn linear is for"),
        ([{"span": (0, 2)}, {"span": (3, 5), "text": "shared"}], r"block 1: .* text shared is for"),
    ],
)
def test_what_a_block_cannot_be_is_said_wherever_a_plan_meets_the_teacher(teacher, blocks, words):
    plan = FLUX.plan(*(BlockPlan.model_validate(block) for block in blocks))
    for meets in (
        lambda: assemble(teacher, plan),
        lambda: family.build(FLUX.config, plan, "meta"),
        lambda: plan_parameters(plan, FLUX.config),
    ):
        with pytest.raises(PlanError, match=words) as caught:
            meets()
        assert "\n" not in str(caught.value)


def test_what_is_not_refused_can_be_built():
    every = candidates(6, 3, (0.5, "linear"), ("dual", "projected", "shared"))
    possible = [block for block in every if family.refusal(FLUX.config, block) is None]
    assert {block.span for block in possible if block.length > 1} == {
        (0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5),
    }  # fmt: skip
    for block in possible:
        built = family.build_block(FLUX.config, block, "meta")
        assert count(built) == family.block_parameters(FLUX.config, block)


def test_a_cut_single_block_keeps_the_most_important_channels_whole(teacher):
    whole = family.block_modules(teacher)[4]
    made = make_block(
        family, FLUX.config, family.block_modules(teacher), BlockPlan(span=(4, 4), ffn=0.25)
    )
    written = whole.proj_out.weight[:, 16:]
    importance = whole.proj_mlp.weight.norm(dim=1) * written.norm(dim=0)
    kept = importance.topk(16).indices.sort().values
    assert torch.equal(made.proj_mlp.weight, whole.proj_mlp.weight[kept])
    assert torch.equal(made.proj_mlp.bias, whole.proj_mlp.bias[kept])
    assert torch.equal(made.proj_out.weight[:, :16], whole.proj_out.weight[:, :16])
    assert torch.equal(made.proj_out.weight[:, 16:], written[:, kept])
    assert torch.equal(made.proj_out.bias, whole.proj_out.bias)
    assert torch.equal(made.attn.to_q.weight, whole.attn.to_q.weight)


@pytest.mark.parametrize("guided", [True, False])
def test_only_a_guidance_distilled_teacher_is_told_the_guidance(guided):
    config = {**FLUX.config, "guidance_embeds": guided}
    model = replace(FLUX, config=config).model()
    named = dict(model.named_parameters())
    assert any("guidance_embedder" in name for name in named) == guided
    velocity = family.forward(model, FLUX.inputs())
    if guided:
        named["time_text_embed.guidance_embedder.linear_1.weight"].mul_(2)
        assert not torch.equal(family.forward(model, FLUX.inputs()), velocity)


def test_the_pooled_embedding_reaches_the_velocity(teacher):
    inputs = FLUX.inputs()
    other = replace(inputs, pooled_BP=inputs.pooled_BP + 1)
    assert not torch.equal(family.forward(teacher, inputs), family.forward(teacher, other))


def test_a_student_obeys_the_guidance_that_its_pipeline_asks_for(teacher):
    from diffusers import FluxTransformer2DModel

    student, inputs = assemble(teacher, FLUX.cut), FLUX.inputs()
    called = {
        "hidden_states": inputs.noisy_BNC,
        "encoder_hidden_states": inputs.embeds_BMD,
        "pooled_projections": inputs.pooled_BP,
        "timestep": inputs.timestep_B,
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 2, 3))).float(),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((2,), 7.0),
        "return_dict": False,
    }
    (ours,) = student(**called)
    assert torch.equal(ours, FluxTransformer2DModel.forward(student, **called)[0])
    assert not torch.equal(ours, family.forward(student, inputs))


def test_a_teacher_that_reads_another_picture_is_refused():
    with pytest.raises(FamilyError, match="in_channels is 384"):
        family_of({**PUBLISHED, "in_channels": 384, "out_channels": 64})


def test_a_plan_knows_no_border_until_it_meets_a_teacher():
    plan = uniform_plan("flux", 57, 28)
    with pytest.raises(PlanError, match="the dual blocks, 0 to 18"):
        plan_parameters(plan, PUBLISHED)
