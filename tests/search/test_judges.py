"""Models judged by several processes are judged as by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from search import judges
from search.config import SweepConfig
from search.judges import Drawing, JudgingActor, judge_apart, judge_here
from search.judging import TEACHER, Drawn, JudgeConfig, captions_for, read_judged
from search.stages import stage_named
from search.stages.place import Site
from search.sweep import Sweep, open_sweep
from tests.trainers.small import load_transformer, local_ray
from trainers.students.plan import uniform_plan
from trainers.students.surgery import assemble
from trainers.worker import publish_student

JUDGE = JudgeConfig(task="shapes", per_family=6, steps=2, shown=3)
STUDENT = "student"


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture
def sweep(tmp_path: Path, tiny_pipeline: Path) -> Sweep:
    config = {
        "name": "tiny",
        "teacher": str(tiny_pipeline),
        "storage": str(tmp_path),
        "budgets": ["60%"],
    }
    sweep = open_sweep(SweepConfig.model_validate(config))
    plan = uniform_plan(sweep.teacher.family.name, 6, 3)
    weights = assemble(load_transformer(tiny_pipeline), plan).state_dict()
    publish_student(sweep.store, STUDENT, plan, weights, sweep.teacher)
    return sweep


@pytest.fixture
def drawing(sweep: Sweep) -> Drawing:
    captions = captions_for(JUDGE, ())
    assert len(captions) == 36
    drawing = Drawing(sweep.teacher, JUDGE, tuple(captions), size=64)
    assert len(drawing.parts()) == 2
    return drawing


class Shown:
    """Progress that is kept."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.seen.append((done, total))


class LostOnce(JudgingActor):
    """Its first process is killed as it draws; a mark in the store says so."""

    def draw(self, model: str, part: range) -> Drawn:
        if not [*self._store.keys("lost")]:
            self._store.write("lost/once", b"")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(model, part)


@pytest.mark.usefixtures("ray")
def test_what_several_draw_is_what_one_draws_though_a_process_is_lost(
    sweep: Sweep, drawing: Drawing, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, apart = Shown(), Shown()
    site = Site(sweep.store, "cpu", alone)
    judge_here(site, drawing, {TEACHER: "alone/teacher", STUDENT: "alone/student"})
    monkeypatch.setattr(judges, "JudgingActor", LostOnce)
    judge_apart(sweep, drawing, {TEACHER: "apart/teacher", STUDENT: "apart/student"}, apart)
    assert [*sweep.store.keys("lost")]
    for model in (TEACHER, STUDENT):
        ones, others = (read_judged(sweep.store, f"{way}/{model}") for way in ("alone", "apart"))
        assert ones is not None
        assert others is not None
        assert len(ones.captions) == 3
        assert (ones.scores, ones.captions, ones.passed) == (
            others.scores,
            others.captions,
            others.passed,
        )
        for one, other in zip(ones.pictures, others.pictures, strict=True):
            # As far as float32 allows: this process may have more threads than each of those.
            np.testing.assert_allclose(np.array(one, float), np.array(other, float), atol=1)
    for shown in (alone, apart):
        assert shown.seen[0] == (0, 72)
        assert shown.seen[-1] == (72, 72)
        assert [done for done, _ in shown.seen] == sorted(done for done, _ in shown.seen)


def test_a_cluster_is_needed_for_several_alone(sweep: Sweep) -> None:
    stage = stage_named("publish")
    for workers in (1, 2):
        config = sweep.config.model_copy(update={"workers": workers})
        assert stage.needs_cluster(Sweep(config, sweep.store, sweep.teacher)) == (workers > 1)
