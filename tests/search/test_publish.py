from __future__ import annotations

from pathlib import Path

import pytest

from search.objectives import Objective, judge_decides
from search.publish import Finalist, choose, register
from search.report.data import Scores
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


def test_best_holds_the_best_of_all_sweeps(store: Store, teacher: Teacher) -> None:
    assert register(store, teacher, "one", finalist(0.2)) == "best/50pct"
    worse = register(store, teacher, "two", finalist(0.3, prefix="b/student"))
    assert worse == "sweeps/two/students/50pct"
    better = register(store, teacher, "three", finalist(0.1, prefix="c/student"))
    assert better == "best/50pct"


def test_registering_again_changes_nothing(store: Store, teacher: Teacher) -> None:
    register(store, teacher, "one", finalist(0.2))
    before = list(store.keys("registry"))
    assert register(store, teacher, "one", finalist(0.2)) == "best/50pct"
    assert list(store.keys("registry")) == before
