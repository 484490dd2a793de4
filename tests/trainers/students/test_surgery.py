"""Replacements carry the weights their plan says, and assembled students load where they should."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.trainers.students.test_families import (
    CUT,
    TINY,
    count,
    family,
    random_inputs,
    random_model,
)
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, Plan, identity_plan, uniform_plan
from trainers.students.surgery import SurgeryError, assemble, make_block


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return random_model(identity_plan("qwen_image", 6))


@pytest.fixture(scope="module")
def teacher_blocks(teacher: nn.Module) -> nn.ModuleList:
    return family.block_modules(teacher)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    ("span", "start", "source"),
    [((1, 3), "first", 1), ((1, 3), "middle", 2), ((1, 4), "middle", 2), ((4, 4), "average", 4)],
)
def test_first_and_middle_copy_one_block(teacher_blocks, span, start, source):
    made = make_block(family, TINY, teacher_blocks, BlockPlan(span=span, start=start))
    assert same(made, teacher_blocks[source])


def test_average_is_the_plain_mean(teacher_blocks):
    made = make_block(family, TINY, teacher_blocks, BlockPlan(span=(1, 3), start="average"))
    for name, tensor in made.state_dict().items():
        mean = torch.stack([teacher_blocks[i].state_dict()[name] for i in (1, 2, 3)]).mean(0)
        torch.testing.assert_close(tensor, mean)


def test_a_cut_ffn_keeps_the_most_important_channels_whole(teacher_blocks):
    made = make_block(family, TINY, teacher_blocks, BlockPlan(span=(2, 3), ffn=0.25))
    for name, narrow in family.ffns(made).items():
        wide = family.ffns(teacher_blocks[2])[name]
        read, write = wide.net[0].proj, wide.net[2]
        importance = read.weight.norm(dim=1) * write.weight.norm(dim=0)
        kept = importance.topk(16).indices.sort().values
        assert torch.equal(narrow.net[0].proj.weight, read.weight[kept])
        assert torch.equal(narrow.net[0].proj.bias, read.bias[kept])
        assert torch.equal(narrow.net[2].weight, write.weight[:, kept])
        assert torch.equal(narrow.net[2].bias, write.bias)
    rest = {k: v for k, v in made.state_dict().items() if "_mlp." not in k}
    assert all(torch.equal(v, teacher_blocks[2].state_dict()[k]) for k, v in rest.items())


def test_cutting_channels_that_write_nothing_changes_nothing():
    plan = identity_plan("qwen_image", 6)
    model = random_model(plan)
    for block in family.block_modules(model):
        for ffn in family.ffns(block).values():
            ffn.net[2].weight[:, ::2] = 0
    blocks = tuple(BlockPlan(span=(i, i), ffn=0.5) for i in range(6))
    student = assemble(model, plan.model_copy(update={"blocks": blocks}))
    inputs = random_inputs()
    torch.testing.assert_close(family.forward(student, inputs), family.forward(model, inputs))


def test_given_importance_decides_which_channels_stay(teacher_blocks):
    wanted = torch.arange(64.0)
    made = make_block(
        family,
        TINY,
        teacher_blocks,
        BlockPlan(span=(2, 2), ffn=0.5),
        {"image": wanted, "text": -wanted},
    )
    source = family.ffns(teacher_blocks[2])
    assert torch.equal(
        family.ffns(made)["image"].net[0].proj.weight, source["image"].net[0].proj.weight[32:]
    )
    assert torch.equal(
        family.ffns(made)["text"].net[0].proj.weight, source["text"].net[0].proj.weight[:32]
    )


def test_the_identity_plan_is_the_teacher(teacher):
    student = assemble(teacher, identity_plan("qwen_image", 6))
    inputs = random_inputs()
    assert torch.equal(family.forward(student, inputs), family.forward(teacher, inputs))


@pytest.mark.parametrize("start", ["first", "middle", "average"])
def test_a_student_counts_as_its_plan_and_shares_no_weights(teacher, start):
    plan = uniform_plan("qwen_image", 6, 4, start=start)
    student = assemble(teacher, plan)
    assert count(student) == plan_parameters(plan, TINY)
    assert all(parameter.requires_grad for parameter in student.parameters())
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    own = [parameter.data_ptr() for parameter in student.parameters()]
    assert theirs.isdisjoint(own)
    assert len(set(own)) == len(own)


def test_a_student_keeps_the_teachers_dtype():
    half = random_model(identity_plan("qwen_image", 6)).to(torch.bfloat16)
    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=(BlockPlan(span=(0, 3), start="average", ffn=0.5), BlockPlan(span=(4, 5))),
    )
    assert {p.dtype for p in assemble(half, plan).parameters()} == {torch.bfloat16}


def test_library_weights_go_where_the_plan_says(teacher, teacher_blocks):
    block = BlockPlan(span=(0, 2), start="library", ffn=0.5)
    trained = make_block(family, TINY, teacher_blocks, block.model_copy(update={"start": "first"}))
    for parameter in trained.parameters():
        parameter.data.add_(1.0)
    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=(block, BlockPlan(span=(3, 3)), BlockPlan(span=(4, 5))),
    )
    asked = []

    def library(wanted: BlockPlan):
        asked.append(wanted)
        return trained.state_dict()

    student = assemble(teacher, plan, library)
    assert asked == [block]
    assert same(family.block_modules(student)[0], trained)
    assert same(family.block_modules(student)[1], teacher_blocks[3])
    pointers = {p.data_ptr() for p in trained.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in student.parameters())


def test_library_weights_of_another_shape_are_refused_with_the_block(teacher, teacher_blocks):
    block = BlockPlan(span=(0, 5), start="library", ffn=0.5)
    plan = Plan(family="qwen_image", teacher_blocks=6, blocks=(block,))
    with pytest.raises(SurgeryError, match=r"span \[0, 5\], ffn 0.5: .*mlp.*\[32"):
        assemble(teacher, plan, lambda _: teacher_blocks[0].state_dict())
    with pytest.raises(SurgeryError, match=r"span \[0, 5\].*no library"):
        assemble(teacher, plan)


def test_a_plan_for_another_teacher_is_refused(teacher):
    with pytest.raises(SurgeryError, match="teacher of 7 blocks, this one has 6"):
        assemble(teacher, uniform_plan("qwen_image", 7, 3))


def test_a_depth_only_student_loads_in_the_stock_class(teacher, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    student = assemble(teacher, uniform_plan("qwen_image", 6, 3, start="average"))
    assert type(student) is QwenImageTransformer2DModel
    student.save_pretrained(tmp_path)
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    inputs = random_inputs()
    assert torch.equal(family.forward(loaded, inputs), family.forward(student, inputs))


def test_a_width_cut_student_survives_save_and_load(teacher, tmp_path):
    from trainers import PrunedQwenImageTransformer2DModel

    student = assemble(teacher, CUT)
    student.save_pretrained(tmp_path)
    loaded = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path)
    inputs = random_inputs()
    assert [shape["ffn"] for shape in loaded.config.block_shapes] == [32, 64]
    assert torch.equal(family.forward(loaded, inputs), family.forward(student, inputs))


def test_a_student_trains(teacher):
    student = assemble(teacher, CUT)
    family.forward(student, random_inputs()).square().mean().backward()
    blocks = family.block_modules(student)
    assert all(p.grad is not None for p in itertools.islice(blocks[0].parameters(), 4))
