"""Every family runs a model block by block as the model runs itself, and counts it exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.trainers.small import padded as with_padding
from tests.trainers.small import same_sums
from tests.trainers.students.tiny import (
    BLOCKS,
    FAMILY_TEACHERS,
    QWEN_IMAGE,
    Tiny,
    count,
    plans,
    run_blocks,
    stock_forward,
)
from trainers.students.counts import memory, plan_parameters
from trainers.students.families import FAMILIES, family_named, family_of
from trainers.students.families.base import FamilyError, State
from trainers.students.fits import fit_maps, gather_maps
from trainers.students.plan import BlockPlan, PlanError, identity_plan, uniform_plan
from trainers.students.surgery import assemble

TEXT_AS_IMAGE = {
    "qwen_image": {"txt_mod": "img_mod", "txt_mlp": "img_mlp"},
    "flux": {"norm1_context": "norm1", "ff_context": "ff"},
}
"""What a dual block's text has of its own beside attention, and the image's."""

ATTENTION = {
    "add_q_proj": "to_q", "add_k_proj": "to_k", "add_v_proj": "to_v",
    "to_add_out": "to_out.0", "norm_added_q": "norm_q", "norm_added_k": "norm_k",
}  # fmt: skip
"""The same of attention."""


@pytest.mark.parametrize("cut", [False, True], ids=["stock", "pruned"])
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_run_one_by_one_equal_the_stock_forward(tiny: Tiny, cut, padded):
    model, inputs = tiny.model(tiny.cut if cut else tiny.identity), tiny.inputs(padded)
    chained = run_blocks(tiny.family, model, inputs)
    assert chained.shape == (2, 6, 64)
    assert torch.equal(chained, stock_forward(tiny, model, inputs))
    assert torch.equal(chained, tiny.family.forward(model, inputs))


def changed(tiny: Tiny, model: nn.Module, **variant: Any) -> tuple[nn.Module, State, Any]:
    """Block 2 of another variant with the stock block's weights where it has them, and the state
    before it."""
    family, block = tiny.family, BlockPlan(span=(2, 2), **variant)
    stock = family.block_modules(model)[2]
    tensors = family.block_tensors(block, stock.state_dict())
    made = family.build_block(tiny.config, block)
    made.load_state_dict(tensors, strict=False)
    for name in family.maps(block):
        nn.init.zeros_(made.get_submodule(name).weight)
        nn.init.zeros_(made.get_submodule(name).bias)
    state, context = family.begin(model, tiny.inputs())
    for before in family.block_modules(model)[:2]:
        state = family.run_block(before, state, context)
    return made.requires_grad_(False), state, context


def test_projected_text_that_is_projected_right_leaves_the_image_as_the_teacher_has_it(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    made, state, context = changed(tiny, model, text="projected")
    right = family.run_block(family.block_modules(model)[2], state, context)
    after = family.run_block(made, state._replace(modulated_BMD=right.modulated_BMD), context)
    torch.testing.assert_close(after.image_BND, right.image_BND)
    assert torch.equal(after.text_BMD, state.text_BMD)  # held
    assert torch.equal(after.modulated_BMD, right.modulated_BMD)


def test_the_maps_of_projected_text_are_residual(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    made, state, context = changed(tiny, model, text="projected", text_map=True)
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


def test_shared_weights_are_a_dual_block_whose_text_branch_is_the_image_branch(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    stock = family.block_modules(model)[2]
    attention = {f"attn.{text}": f"attn.{image}" for text, image in ATTENTION.items()}
    for text, image in (TEXT_AS_IMAGE[tiny.name] | attention).items():
        stock.get_submodule(text).load_state_dict(stock.get_submodule(image).state_dict())
    made, state, context = changed(tiny, model, text="shared")
    for ours, theirs in zip(
        family.run_block(made, state, context), family.run_block(stock, state, context), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_linear_ffn_adds_a_map_of_the_state_after_attention(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    stock = family.block_modules(model)[2]
    made, state, context = changed(tiny, model, ffn="linear")
    for ffn in family.ffns(stock).values():  # without its FFNs a stock block ends after attention
        ffn.net[2].weight.zero_()
        ffn.net[2].bias.zero_()
    attended = family.run_block(stock, state, context)
    maps = family.ffns(made)
    for ffn in maps.values():
        nn.init.normal_(ffn.weight)
    after = family.run_block(made, state, context)
    image, text = attended.image_BND, attended.text_BMD
    torch.testing.assert_close(after.image_BND, image + image @ maps["image"].weight.T)
    torch.testing.assert_close(after.text_BMD, text + text @ maps["text"].weight.T)


def test_map_pairs_are_what_the_teachers_block_does(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    stock, inputs = family.block_modules(model)[2], tiny.inputs()
    image, text = family.maps(BlockPlan(span=(2, 2), ffn="linear"))
    _, state, context = changed(tiny, model)
    after, pairs = family.map_pairs(stock, state, context)
    for ours, theirs in zip(after, family.run_block(stock, state, context), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(pairs["txt_map"].read + pairs["txt_map"].added, after.text_BMD)
    torch.testing.assert_close(pairs[image].read + pairs[image].added, after.image_BND)
    torch.testing.assert_close(pairs[text].read + pairs[text].added, after.text_BMD)
    projection = pairs["txt_proj"]
    torch.testing.assert_close(projection.read + projection.added, after.modulated_BMD)
    _, first = family.map_pairs(family.block_modules(model)[0], *family.begin(model, inputs))
    assert "txt_proj" not in first  # nothing before it has a text branch


def test_maps_fitted_in_closed_form_bring_a_cut_teacher_closer(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    with torch.no_grad():
        for parameter in model.parameters():  # tame, so that blocks are nearly linear
            parameter.mul_(0.3)
    inputs = tiny.inputs()
    cut = BlockPlan(span=(1, 2), ffn="linear", start="average", text="projected", text_map=True)
    plan = tiny.plan(BlockPlan(span=(0, 0)), cut, BlockPlan(span=(3, 5)))
    fits = fit_maps(model, family, [inputs], dict.fromkeys(range(BLOCKS), family.maps(cut))).fits
    right = family.forward(model, inputs)
    errors = [
        (family.forward(assemble(model, plan, fits=given), inputs) - right).square().mean()
        for given in (None, fits)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("padded", [True, False])
def test_padding_is_not_fitted(padded: bool):
    """Only a family that masks padding has any."""
    family, model, inputs = QWEN_IMAGE.family, QWEN_IMAGE.model(), QWEN_IMAGE.inputs(padded)
    block = BlockPlan(span=(1, 2), ffn="linear", text="projected", text_map=True)
    wanted = dict.fromkeys(range(BLOCKS), family.maps(block))
    sums = gather_maps(model, family, [inputs], wanted)
    assert sums[1, "txt_map"].count == (8 if padded else 10)
    same_sums(gather_maps(model, family, [with_padding(inputs)], wanted), sums)


def test_a_fit_is_the_least_squares_solution_with_a_bias(tiny: Tiny):
    generator = torch.Generator().manual_seed(0)
    family, model, inputs = tiny.family, tiny.model(), tiny.inputs(padded=False)
    batches = [
        replace(inputs, noisy_BNC=torch.randn(2, 6, 64, generator=generator)) for _ in range(8)
    ]
    name = family.maps(BlockPlan(span=(1, 1), ffn="linear"))[0]
    fits = fit_maps(model, family, batches, {1: (name,)}).fits
    read, added = [], []
    for batch in batches:
        state, context = family.begin(model, batch)
        state = family.run_block(family.block_modules(model)[0], state, context)
        pair = family.map_pairs(family.block_modules(model)[1], state, context)[1][name]
        read.append(pair.read.flatten(0, 1))
        added.append(pair.added.flatten(0, 1))
    x, y = torch.cat(read), torch.cat(added)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(fits[1][f"{name}.weight"], expected[:-1].T, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(fits[1][f"{name}.bias"], expected[-1], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_teacher_counts_as_it_is_built(name):
    family = FAMILIES[name]
    config = family.published
    assert family_of(config) is family
    plan = identity_plan(name, family.blocks(config))
    assert count(family.build(config, plan, "meta")) == plan_parameters(plan, config)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_plan_counts_as_it_is_built(data):
    tiny = data.draw(st.sampled_from(FAMILY_TEACHERS))
    plan, family = data.draw(plans(tiny)), tiny.family
    model = family.build(tiny.config, plan, "meta")
    assert count(model) == plan_parameters(plan, tiny.config)
    assert type(model).__name__ == family.student_class(plan)[1]
    weights = model.state_dict()
    prefixes = family.block_prefixes(tiny.config, plan)
    modules = family.block_modules(model)
    for module, block, prefix in zip(modules, plan.blocks, prefixes, strict=True):
        alone = family.build_block(tiny.config, block, "meta")
        assert count(alone) == family.block_parameters(tiny.config, block)
        shapes = {name: tensor.shape for name, tensor in alone.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
        inside = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        assert shapes == {name[len(prefix) :]: tensor.shape for name, tensor in inside.items()}


@given(st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_students_config_and_plan_tell_its_teachers_sizes(data):
    tiny = data.draw(st.sampled_from(FAMILY_TEACHERS))
    plan = data.draw(plans(tiny))
    own = tiny.family.student_config(tiny.config, plan)
    known = tiny.family.teacher_config(own, plan)
    assert plan_parameters(plan, known) == plan_parameters(plan, tiny.config)
    assert plan_parameters(tiny.identity, known) == plan_parameters(tiny.identity, tiny.config)


def test_build_takes_dtype_and_leaves_nothing_on_meta(tiny: Tiny):
    model = tiny.family.build(tiny.config, tiny.cut, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def test_a_plan_for_another_teacher_is_refused(tiny: Tiny):
    plan = uniform_plan(tiny.name, 7, 7)
    for meets in (
        lambda: assemble(tiny.model(), plan),
        lambda: tiny.family.build(tiny.config, plan, "meta"),
        lambda: plan_parameters(plan, tiny.config),
    ):
        with pytest.raises(PlanError, match="teacher of 7 blocks, this one has 6"):
            meets()


def test_memory_counts_weights_gradients_and_moments():
    assert memory(10).weights == 20
    assert memory(10).training == 80
    assert memory(10, bytes_each=4).weights == 40


def test_family_of_names_the_unknown_class_and_the_file():
    with pytest.raises(FamilyError, match=r"x/config.json.*SD3Transformer.*QwenImage.*Flux"):
        family_of({"_class_name": "SD3Transformer2DModel"}, "x/config.json")


def test_family_named_names_the_known():
    assert family_named("qwen_image") is FAMILIES["qwen_image"]
    with pytest.raises(FamilyError, match=r"'sd3'.*qwen_image, flux"):
        family_named("sd3")
