"""A family runs a model block by block exactly as the model runs itself, and counts it exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests.trainers.students.test_plan import plans
from trainers.students.counts import memory, plan_parameters
from trainers.students.families import FAMILIES, family_named, family_of
from trainers.students.families.base import FamilyError, Inputs, State
from trainers.students.fits import fit_maps
from trainers.students.plan import BlockPlan, Plan, identity_plan
from trainers.students.surgery import assemble

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


def run_blocks(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    state, context = family.begin(model, inputs)
    for block in family.block_modules(model):
        state = family.run_block(block, state, context)
    return family.end(model, state, context)


@pytest.mark.parametrize("plan", [identity_plan("qwen_image", 6), CUT], ids=["stock", "pruned"])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_run_one_by_one_equal_the_stock_forward(plan, padded):
    model, inputs = random_model(plan), random_inputs(padded)
    chained = run_blocks(model, inputs)
    assert chained.shape == (2, 6, 64)
    stock = QwenImageTransformer2DModel.forward(
        model,
        hidden_states=inputs.noisy_BNC,
        encoder_hidden_states=inputs.embeds_BMD,
        encoder_hidden_states_mask=inputs.mask_BM,
        timestep=inputs.timestep_B,
        img_shapes=[[(1, 2, 3)]] * 2,
        return_dict=False,
    )[0]
    assert torch.equal(chained, stock)
    assert torch.equal(chained, family.forward(model, inputs))


def changed(model: nn.Module, i: int, **variant: Any) -> tuple[nn.Module, State, Any]:
    """A block of another variant with the stock block's weights where it has them, and the state
    before it."""
    block = BlockPlan(span=(i, i), **variant)
    stock = family.block_modules(model)[i]
    tensors = family.block_tensors(block, stock.state_dict())
    made = family.build_block(TINY, block)
    made.load_state_dict(tensors, strict=False)
    for name in family.maps(block):
        nn.init.zeros_(made.get_submodule(name).weight)
        nn.init.zeros_(made.get_submodule(name).bias)
    state, context = family.begin(model, random_inputs())
    for before in family.block_modules(model)[:i]:
        state = family.run_block(before, state, context)
    return made.requires_grad_(False), state, context


def test_projected_text_that_is_projected_right_leaves_the_image_as_the_teacher_has_it():
    model = random_model(identity_plan("qwen_image", 6))
    made, state, context = changed(model, 2, text="projected")
    right = family.run_block(family.block_modules(model)[2], state, context)
    after = family.run_block(made, state._replace(modulated_BMD=right.modulated_BMD), context)
    torch.testing.assert_close(after.image_BND, right.image_BND)
    assert torch.equal(after.text_BMD, state.text_BMD)  # held
    assert torch.equal(after.modulated_BMD, right.modulated_BMD)


def test_the_maps_of_projected_text_are_residual():
    model = random_model(identity_plan("qwen_image", 6))
    made, state, context = changed(model, 2, text="projected", text_map=True)
    right = family.run_block(family.block_modules(model)[2], state, context)
    made.txt_map.bias.fill_(2.0)
    made.txt_proj.weight.copy_(torch.eye(16))
    made.txt_proj.bias.fill_(-1.0)
    # Reads x where x + x − 1 is what the teacher's block reads.
    after = family.run_block(
        made, state._replace(modulated_BMD=(right.modulated_BMD + 1) / 2), context
    )
    torch.testing.assert_close(after.image_BND, right.image_BND)
    torch.testing.assert_close(after.text_BMD, state.text_BMD + 2)


def test_shared_weights_are_a_dual_block_whose_text_branch_is_the_image_branch():
    model = random_model(identity_plan("qwen_image", 6))
    stock = family.block_modules(model)[2]
    stock.txt_mod.load_state_dict(stock.img_mod.state_dict())
    stock.txt_mlp.load_state_dict(stock.img_mlp.state_dict())
    attn = stock.attn
    for text, image in (
        ("add_q_proj", "to_q"), ("add_k_proj", "to_k"), ("add_v_proj", "to_v"),
        ("to_add_out", "to_out.0"), ("norm_added_q", "norm_q"), ("norm_added_k", "norm_k"),
    ):  # fmt: skip
        attn.get_submodule(text).load_state_dict(attn.get_submodule(image).state_dict())
    made, state, context = changed(model, 2, text="shared")
    for ours, theirs in zip(
        family.run_block(made, state, context), family.run_block(stock, state, context), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_linear_ffn_adds_a_map_of_the_state_after_attention():
    model = random_model(identity_plan("qwen_image", 6))
    stock = family.block_modules(model)[2]
    made, state, context = changed(model, 2, ffn="linear")
    for ffn in ("img_mlp", "txt_mlp"):  # without its FFNs a stock block ends after attention
        getattr(stock, ffn).net[2].weight.zero_()
        getattr(stock, ffn).net[2].bias.zero_()
    attended = family.run_block(stock, state, context)
    for ffn in (made.img_mlp, made.txt_mlp):
        nn.init.normal_(ffn.weight)
    after = family.run_block(made, state, context)
    image, text = attended.image_BND, attended.text_BMD
    torch.testing.assert_close(after.image_BND, image + image @ made.img_mlp.weight.T)
    torch.testing.assert_close(after.text_BMD, text + text @ made.txt_mlp.weight.T)


def test_map_pairs_are_what_the_teachers_block_does():
    model = random_model(identity_plan("qwen_image", 6))
    stock, inputs = family.block_modules(model)[2], random_inputs()
    _, state, context = changed(model, 2)
    after, pairs = family.map_pairs(stock, state, context)
    for ours, theirs in zip(after, family.run_block(stock, state, context), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(pairs["txt_map"].read + pairs["txt_map"].added, after.text_BMD)
    torch.testing.assert_close(pairs["img_mlp"].read + pairs["img_mlp"].added, after.image_BND)
    projection = pairs["txt_proj"]
    torch.testing.assert_close(projection.read + projection.added, after.modulated_BMD)
    _, first = family.map_pairs(family.block_modules(model)[0], *family.begin(model, inputs))
    assert "txt_proj" not in first  # nothing before it has a text branch


def test_maps_fitted_in_closed_form_bring_a_cut_teacher_closer():
    model = random_model(identity_plan("qwen_image", 6))
    with torch.no_grad():
        for parameter in model.parameters():  # tame, so that blocks are nearly linear
            parameter.mul_(0.3)
    inputs = random_inputs()
    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=(
            BlockPlan(span=(0, 1)),
            BlockPlan(span=(2, 2), text="projected", text_map=True),
            BlockPlan(span=(3, 5), ffn="linear", start="average"),
        ),
    )
    wanted = dict.fromkeys(range(6), ("img_mlp", "txt_mlp", "txt_proj", "txt_map"))
    fits = fit_maps(model, family, [inputs], wanted)
    right = family.forward(model, inputs)
    errors = [
        (family.forward(assemble(model, plan, fits=given), inputs) - right).square().mean()
        for given in (None, fits)
    ]
    assert errors[1] < errors[0]


def test_a_fit_is_the_least_squares_solution_with_a_bias():
    generator = torch.Generator().manual_seed(0)
    model = random_model(identity_plan("qwen_image", 6))
    inputs = random_inputs(padded=False)
    batches = [
        replace(inputs, noisy_BNC=torch.randn(2, 6, 64, generator=generator)) for _ in range(8)
    ]
    fits = fit_maps(model, family, batches, {1: ("img_mlp",)})
    read, added = [], []
    for batch in batches:
        state, context = family.begin(model, batch)
        state = family.run_block(family.block_modules(model)[0], state, context)
        pair = family.map_pairs(family.block_modules(model)[1], state, context)[1]["img_mlp"]
        read.append(pair.read.flatten(0, 1))
        added.append(pair.added.flatten(0, 1))
    x, y = torch.cat(read), torch.cat(added)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(fits[1]["img_mlp.weight"], expected[:-1].T, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(fits[1]["img_mlp.bias"], expected[-1], atol=2e-2, rtol=2e-2)


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
    assert family.block_parameters(QWEN_IMAGE, block) == parameters
    assert count(family.build_block(QWEN_IMAGE, block, "meta")) == parameters


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
