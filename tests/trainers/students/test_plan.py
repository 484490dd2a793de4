"""The plan says what is wrong with a bad one, and its digest names the student."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from tests.trainers.students.tiny import plans
from trainers.students.plan import (
    BlockPlan,
    Plan,
    PlanError,
    identity_plan,
    load_plan,
    uniform_plan,
)


def plan(*spans: tuple[int, int], teacher_blocks: int = 6) -> Plan:
    blocks = tuple(BlockPlan(span=span) for span in spans)
    return Plan(family="qwen_image", teacher_blocks=teacher_blocks, blocks=blocks)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(0, 1), (3, 5)], ["block 1", "[3, 5]", "gap", "[0, 1]"]),
        ([(1, 5)], ["block 0", "[1, 5]", "gap"]),
        ([(0, 2), (2, 5)], ["block 1", "[2, 5]", "overlaps", "[0, 2]"]),
        ([(-1, 5)], ["block 0", "[-1, 5]", "overlaps the start"]),
        ([(0, 2), (5, 3)], ["block 1", "[5, 3]", "reversed"]),
        ([(0, 2), (3, 6)], ["block 1", "[3, 6]", "past", "last block, 5"]),
        ([(0, 2)], ["block 0", "[0, 2]", "before", "last block, 5"]),
        ([], ["no blocks"]),
    ],
)
def test_a_bad_partition_is_refused_with_the_block_that_is_wrong(spans, words):
    with pytest.raises(PlanError) as caught:
        plan(*spans)
    for word in words:
        assert word in str(caught.value)


@given(plans())
def test_json_round_trip_keeps_plan_and_digest(original: Plan):
    read = Plan.from_json(original.to_json())
    assert read == original
    assert read.digest == original.digest


def test_defaults_written_out_do_not_change_the_digest():
    long = {
        "family": "qwen_image",
        "teacher_blocks": 2,
        "blocks": [{"span": [0, 1], "start": "first", "ffn": 1, "text": "dual"}],
    }
    assert Plan.from_json(json.dumps(long)).digest == plan((0, 1), teacher_blocks=2).digest


def test_digest_is_stable():
    assert plan((0, 2), (3, 5)).digest == "3735eab305f51a4d"


def test_digest_tells_students_apart():
    a = BlockPlan(span=(0, 1))
    variants = [a, *(a.model_copy(update=u) for u in ({"ffn": 0.5}, {"start": "middle"}))]
    digests = {
        Plan(family="qwen_image", teacher_blocks=2, blocks=(block,)).digest for block in variants
    }
    assert len(digests) == 3


def test_a_single_block_has_one_spelling():
    assert BlockPlan(span=(3, 3), start="library") == BlockPlan(span=(3, 3))
    assert BlockPlan(span=(3, 3), start="average", ffn=0.5) == BlockPlan(span=(3, 3), ffn=0.5)
    assert BlockPlan(span=(3, 3), start="library", ffn=0.5).start == "library"


@pytest.mark.parametrize(
    ("start", "length", "same"),
    [
        ("first", 1, {"first", "middle", "average"}),
        ("first", 2, {"first", "middle"}),
        ("middle", 2, {"first", "middle"}),
        ("average", 2, {"average"}),
        ("first", 3, {"first"}),
        ("middle", 4, {"middle"}),
        ("first", 5, {"first"}),
        ("average", 5, {"average"}),
        ("library", 1, {"library"}),
        ("library", 3, {"library"}),
    ],
)
def test_some_starts_make_the_same_block(start, length, same):
    assert BlockPlan(span=(2, 1 + length), start=start, ffn=0.5).starts == same


def test_untouched_and_depth_only():
    assert BlockPlan(span=(3, 3)).untouched
    assert not BlockPlan(span=(3, 4)).untouched
    assert not BlockPlan(span=(3, 3), ffn=0.5).untouched
    assert plan((0, 2), (3, 5)).depth_only
    cut = Plan(family="qwen_image", teacher_blocks=1, blocks=(BlockPlan(span=(0, 0), ffn=0.5),))
    assert not cut.depth_only


@pytest.mark.parametrize(("length", "blocks"), [(6, 4), (16, 5), (60, 30), (7, 7), (9, 1)])
def test_uniform_spans_differ_by_at_most_one(length, blocks):
    made = uniform_plan("qwen_image", length, blocks)
    lengths = {block.length for block in made.blocks}
    assert len(made.blocks) == blocks
    assert max(lengths) - min(lengths) <= 1


def test_a_uniform_plan_larger_than_the_teacher_is_refused():
    with pytest.raises(PlanError, match="6 blocks has no student of 7"):
        uniform_plan("qwen_image", 6, 7)


def test_identity_keeps_every_block():
    assert all(block.untouched for block in identity_plan("qwen_image", 6).blocks)


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_load_plan_reads_plans_and_recipes(tmp_path, recipe, suffix):
    wanted = uniform_plan("qwen_image", 6, 3, start="average")
    body = json.loads(wanted.to_json())
    file = tmp_path / f"plan.{suffix}"
    file.write_text(json.dumps({"plan": body, "teacher": "somewhere"} if recipe else body))
    assert load_plan(file) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["neither JSON nor YAML"]),
        ("[]", ["a plan is a mapping"]),
        ("{family: qwen_image, teacher_blocks: 2}", ["blocks", "required"]),
        (
            "{family: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 1], ffn: 1.5}]}",
            ["blocks[0].ffn", "got 1.5"],
        ),
        (
            "{family: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 1], fnn: 0.5}]}",
            ["blocks[0].fnn: no such field; did you mean ffn?"],
        ),
        (
            "{family: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 1], ffn: linaer}]}",
            ["blocks[0].ffn: must be a valid number", "or must be 'linear', got 'linaer'"],
        ),
        (
            "{familly: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 1]}]}",
            ["family: is required"],
        ),
        (
            "{family: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 1]}], budget: 1}",
            ["budget: no such field; known are family, teacher_blocks, blocks"],
        ),
        ("{family: qwen_image, teacher_blocks: 2, blocks: [{span: [0, 0]}]}", ["block 0"]),
    ],
)
def test_a_bad_file_is_named_with_the_field(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        load_plan(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"gone\.json"):
        load_plan(tmp_path / "gone.json")
