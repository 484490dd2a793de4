from __future__ import annotations

from pathlib import Path

import pytest

from search.objectives import Objective, judge_decides
from search.publish import Finalist, choose, model_prefix, register
from search.report.data import Scores
from storage.registry import best
from storage.store import Store, open_store
from trainers.schedule import Phase, Schedule
from trainers.students.plan import identity_plan
from trainers.teacher import Teacher, open_teacher

SCHEDULE = Schedule(phases=(Phase(loss="velocity", train="all", steps=1, lr=1e-3),))


def finalist(loss: float, score: float | None = None, prefix: str = "a/student") -> Finalist:
    return Finalist(
        budget="50pct",
        prefix=prefix,
        plan=identity_plan("qwen_image", 6),
        schedule=SCHEDULE,
        parameters=10,
        loss_before=2 * loss,
        loss_after=loss,
        scores=None if score is None else Scores(families={}, overall=score),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


@pytest.fixture
def teacher(tiny_pipeline: Path) -> Teacher:
    return open_teacher(tiny_pipeline)


def test_the_judge_decides_before_the_loss() -> None:
    assert choose([finalist(0.1, 0.8), finalist(0.2, 0.9)]).judge_score == 0.9
    assert choose([finalist(0.2, 0.9), finalist(0.1, 0.9)]).loss_after == 0.1
    assert choose([finalist(0.2), finalist(0.1)]).loss_after == 0.1


def test_the_objective_that_is_named_first_decides() -> None:
    finalists = [finalist(0.2, 0.9), finalist(0.1, 0.8)]
    orders: list[tuple[tuple[Objective, ...] | None, float]] = [
        (None, 0.2),
        (("judge_score", "parameters", "fidelity_loss"), 0.2),
        (("fidelity_loss", "latency", "judge_score"), 0.1),
        (("parameters", "fidelity_loss"), 0.1),
    ]
    for objectives, loss in orders:
        assert choose(finalists, judge_decides(objectives)).loss_after == loss


def test_the_best_of_all_sweeps_is_computed(store: Store, teacher: Teacher) -> None:
    worse, better = finalist(0.2), finalist(0.1, prefix="c/student")
    for sweep, one in (("one", worse), ("two", better), ("three", finalist(0.3, prefix="b"))):
        register(store, teacher, sweep, one)
    leader = best(store, "50pct", teacher.digest)
    assert leader is not None
    assert leader.sweep == "two"
    assert leader.model == model_prefix(teacher, better)


def test_no_two_recoveries_share_a_place(teacher: Teacher) -> None:
    one, other = finalist(0.2), finalist(0.2, prefix="b/student")
    assert model_prefix(teacher, one) != model_prefix(teacher, other)
    assert model_prefix(teacher, one).startswith(f"models/50pct/{one.plan.digest}-")


def test_registering_again_changes_nothing(store: Store, teacher: Teacher) -> None:
    register(store, teacher, "one", finalist(0.2))
    before = list(store.keys("registry"))
    register(store, teacher, "one", finalist(0.2))
    assert list(store.keys("registry")) == before
