"""A search on a cluster whose machines come and go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.proposals import Target
from search.score import Bench, Score
from search.trials import SearchConfig, run_search
from storage.store import Store, open_store
from tests.nodes import ROOT, machines
from tests.search.test_proposals import make_space
from trainers.students.plan import Plan
from trainers.teacher import Teacher

TRIALS = 16
JOINED, LEFT = 3, 9
"""Trials after which a second machine joins, and leaves again."""


@dataclass(frozen=True)
class Stand(Bench):
    """Scores without models; notes on which machine, and once there should be two, waits for the
    second to take part."""

    def open(self) -> Any:
        import ray

        store = open_store(self.url)
        node = ray.get_runtime_context().get_node_id()

        def score(plan: Plan) -> Score:
            store.write(f"nodes/{node}", b"")
            done = len([*store.keys(self.scores)])
            until = time.monotonic() + 90
            while done >= JOINED and len([*store.keys("nodes")]) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            return Score(1.0 / (1 + len(plan.blocks)), 0.0)

        return SimpleNamespace(score=score, store=store)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of one small machine."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with machines(head_cpus=1) as started:
        yield started


class Weather:
    """Adds a machine and takes it away again as the search goes on."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.node = cluster, None

    def update(self, done: int, total: int, **facts: float | str) -> None:
        if done == JOINED and self.node is None:
            self.node = self.cluster.add_node(num_cpus=2)
        if done == LEFT and self.node is not None:
            self.cluster.remove_node(self.node, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_actors_follow_the_machines_that_there_are(
    cluster: Any, teacher: Teacher, tmp_path: Path
) -> None:
    store: Store = open_store(str(tmp_path / "store"))
    space = make_space()
    pieces = tuple((block, "library/none") for block in space.pieces)
    bench = Stand(teacher, store.url, "encoded/x", pieces, "scores")
    config = SearchConfig(trials=TRIALS, exact=2, lag=4)
    trials = run_search(
        space, [Target("half", 45)], bench, config, store, "search", progress=Weather(cluster)
    )
    assert len([*store.keys("nodes")]) == 2
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.failed for trial in trials} == {None}
