"""What a person reads off a plan and a schedule."""

from __future__ import annotations

from search.features import plan_features, schedule_features
from tests.search.invented import HALF, SCHEDULE, THIRD
from trainers.students.plan import BlockPlan, Plan, identity_plan


def test_a_plan_in_numbers() -> None:
    assert plan_features(HALF) == {
        "blocks": 3, "own blocks": 1, "longest span": 3, "merge depth": 3 / 5, "FFN kept": 1.0,
        "text given up": 0, "untrained": 0,
    }  # fmt: skip
    assert plan_features(THIRD)["FFN kept"] == 0.75
    assert plan_features(THIRD)["own blocks"] == 0


def test_the_teacher_itself_merges_nowhere() -> None:
    assert plan_features(identity_plan("qwen_image", 1))["merge depth"] == 0.5


def test_linear_ffns_keep_nothing_and_held_text_is_given_up() -> None:
    blocks = (BlockPlan(span=(0, 0), ffn="linear"), BlockPlan(span=(1, 1), text="projected"))
    found = plan_features(Plan(family="qwen_image", teacher_blocks=2, blocks=blocks))
    assert (found["FFN kept"], found["text given up"], found["own blocks"]) == (0.5, 1, 0)


def test_blocks_cut_from_the_teacher_are_untrained_and_its_own_are_not() -> None:
    blocks = (
        BlockPlan(span=(0, 1), start="average"),
        BlockPlan(span=(2, 2), ffn=0.5),
        BlockPlan(span=(3, 3)),
        BlockPlan(span=(4, 5), start="library"),
    )
    found = plan_features(Plan(family="qwen_image", teacher_blocks=6, blocks=blocks))
    assert (found["untrained"], found["own blocks"]) == (2, 1)


def test_phases_of_one_loss_are_told_apart() -> None:
    twice = SCHEDULE.model_copy(update={"phases": (*SCHEDULE.phases, SCHEDULE.phases[1])})
    assert list(schedule_features(twice)) == [
        "1 span steps", "1 span lr", "2 velocity steps", "2 velocity lr", "3 velocity steps",
        "3 velocity lr",
    ]  # fmt: skip
