"""Replacements carry the weights their plan says, and assembled students load where they should."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.trainers.students.tiny import SPANS, Tiny, count, stock_forward
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, uniform_plan
from trainers.students.surgery import SurgeryError, assemble, make_block


@pytest.fixture(scope="module")
def teacher(tiny: Tiny) -> nn.Module:
    return tiny.model()


@pytest.fixture(scope="module")
def teacher_blocks(tiny: Tiny, teacher: nn.Module) -> nn.ModuleList:
    return tiny.family.block_modules(teacher)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    ("span", "start", "source"),
    [((0, 2), "first", 0), ((0, 2), "middle", 1), ((3, 4), "middle", 3), ((4, 4), "average", 4)],
)
def test_first_and_middle_copy_one_block(tiny: Tiny, teacher_blocks, span, start, source):
    made = make_block(tiny.family, tiny.config, teacher_blocks, BlockPlan(span=span, start=start))
    assert same(made, teacher_blocks[source])


@pytest.mark.parametrize("span", SPANS)
def test_average_is_the_plain_mean(tiny: Tiny, teacher_blocks, span):
    block = BlockPlan(span=span, start="average")
    made = make_block(tiny.family, tiny.config, teacher_blocks, block)
    merged = teacher_blocks[span[0] : span[1] + 1]
    for name, tensor in made.state_dict().items():
        mean = torch.stack([module.state_dict()[name] for module in merged]).mean(0)
        torch.testing.assert_close(tensor, mean)


def test_a_cut_ffn_keeps_the_most_important_channels_whole(tiny: Tiny, teacher_blocks):
    made = make_block(tiny.family, tiny.config, teacher_blocks, BlockPlan(span=(1, 2), ffn=0.25))
    for name, narrow in tiny.family.ffns(made).items():
        wide = tiny.family.ffns(teacher_blocks[1])[name]
        read, write = wide.net[0].proj, wide.net[2]
        importance = read.weight.norm(dim=1) * write.weight.norm(dim=0)
        kept = importance.topk(16).indices.sort().values
        assert torch.equal(narrow.net[0].proj.weight, read.weight[kept])
        assert torch.equal(narrow.net[0].proj.bias, read.bias[kept])
        assert torch.equal(narrow.net[2].weight, write.weight[:, kept])
        assert torch.equal(narrow.net[2].bias, write.bias)
    rest = {k: v for k, v in made.state_dict().items() if ".net." not in k}
    assert all(torch.equal(v, teacher_blocks[1].state_dict()[k]) for k, v in rest.items())


def test_cutting_channels_that_write_nothing_changes_nothing(tiny: Tiny):
    family, model = tiny.family, tiny.model()
    for block in family.block_modules(model):
        for ffn in family.ffns(block).values():
            # Of a single FLUX block, attention's output comes first.
            write = ffn.net[2] if hasattr(ffn, "net") else ffn.proj_out
            write.weight[:, -64::2] = 0
    student = assemble(model, tiny.plan(*(BlockPlan(span=(i, i), ffn=0.5) for i in range(6))))
    inputs = tiny.inputs()
    torch.testing.assert_close(family.forward(student, inputs), family.forward(model, inputs))


def test_given_importance_decides_which_channels_stay(tiny: Tiny, teacher_blocks):
    family, wanted = tiny.family, torch.arange(64.0)
    made = make_block(
        family,
        tiny.config,
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


def test_the_identity_plan_is_the_teacher(tiny: Tiny, teacher):
    student = assemble(teacher, tiny.identity)
    inputs = tiny.inputs()
    assert torch.equal(tiny.family.forward(student, inputs), tiny.family.forward(teacher, inputs))


@pytest.mark.parametrize("start", ["first", "middle", "average"])
def test_a_student_counts_as_its_plan_and_shares_no_weights(tiny: Tiny, teacher, start):
    plan = uniform_plan(tiny.name, 6, 4, start=start)
    student = assemble(teacher, plan)
    assert count(student) == plan_parameters(plan, tiny.config)
    assert all(parameter.requires_grad for parameter in student.parameters())
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    own = [parameter.data_ptr() for parameter in student.parameters()]
    assert theirs.isdisjoint(own)
    assert len(set(own)) == len(own)


def test_a_student_keeps_the_teachers_dtype(tiny: Tiny):
    plan = tiny.plan(
        BlockPlan(span=(0, 2), start="average", ffn=0.5),
        BlockPlan(span=(3, 4), start="average", ffn=0.5),
        BlockPlan(span=(5, 5)),
    )
    half = tiny.model().to(torch.bfloat16)
    assert {p.dtype for p in assemble(half, plan).parameters()} == {torch.bfloat16}


def test_library_weights_go_where_the_plan_says(tiny: Tiny, teacher, teacher_blocks):
    family, block = tiny.family, BlockPlan(span=(0, 2), start="library", ffn=0.5)
    trained = make_block(
        tiny.family, tiny.config, teacher_blocks, block.model_copy(update={"start": "first"})
    )
    for parameter in trained.parameters():
        parameter.data.add_(1.0)
    plan = tiny.plan(block, BlockPlan(span=(3, 3)), BlockPlan(span=(4, 5)))
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


def test_library_weights_of_another_shape_are_refused_with_the_block(
    tiny: Tiny, teacher, teacher_blocks
):
    plan = tiny.plan(
        BlockPlan(span=(0, 2), start="library", ffn=0.5), BlockPlan(span=(3, 5), ffn=0.5)
    )
    with pytest.raises(SurgeryError, match=r"span \[0, 2\], ffn 0.5: .*\.net\..*\[32"):
        assemble(teacher, plan, lambda _: teacher_blocks[0].state_dict())
    with pytest.raises(SurgeryError, match=r"span \[0, 2\].*no library"):
        assemble(teacher, plan)


@pytest.mark.parametrize("start", ["first", "average"])
def test_a_depth_only_student_loads_in_the_stock_class(tiny: Tiny, teacher, tmp_path, start):
    import diffusers

    stock = getattr(diffusers, tiny.config["_class_name"])
    student = assemble(teacher, tiny.merged((0, 1), (2, 2), (3, 5), start=start))
    assert type(student) is stock
    student.save_pretrained(tmp_path)
    loaded, inputs = stock.from_pretrained(tmp_path), tiny.inputs()
    assert len(tiny.family.block_modules(loaded)) == 3
    assert torch.equal(stock_forward(tiny, loaded, inputs), tiny.family.forward(student, inputs))


def test_a_width_cut_student_survives_save_and_load(tiny: Tiny, teacher, tmp_path):
    import trainers

    plan = tiny.plan(
        BlockPlan(span=(0, 0), ffn="linear"),
        BlockPlan(span=(1, 1), text="shared"),
        BlockPlan(span=(2, 2), text="projected", text_map=True),
        BlockPlan(span=(3, 5), ffn=0.5),
    )
    student = assemble(teacher, plan)
    student.save_pretrained(tmp_path)
    loaded = getattr(trainers, tiny.family.student_class(plan)[1]).from_pretrained(tmp_path)
    inputs = tiny.inputs()
    assert [shape["ffn"] for shape in loaded.config.block_shapes] == [None, 64, 64, 32]
    assert torch.equal(tiny.family.forward(loaded, inputs), tiny.family.forward(student, inputs))


def test_a_student_trains(tiny: Tiny, teacher):
    student = assemble(teacher, tiny.cut)
    tiny.family.forward(student, tiny.inputs()).square().mean().backward()
    for block in tiny.family.block_modules(student):
        assert all(p.grad is not None for p in itertools.islice(block.parameters(), 4))
