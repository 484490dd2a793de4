"""Recoveries on a cluster whose machines go, with notice and without."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from search.recover import Recovery
from storage.manifest import read_json
from storage.store import Store, open_store
from tests.faults.conftest import Row
from tests.faults.steps import attempts, hold_steps, lost, probing
from tests.faults.test_storage import everything_is_published
from tests.faults.tiny_recovery import prepare, recover_tiny
from tests.nodes import ROOT, joined, machines
from tests.search.test_recover import STEPS, alone_losses, prefix_of
from trainers.placement import Share
from trainers.teacher import Teacher, open_teacher
from trainers.worker import LOSSES, load_student

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

EVERY = 1000
"""Steps between checkpoints, more than there are: the only checkpoint is the one that notice
brings."""


@pytest.fixture
def teacher(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    return open_teacher(tiny_pipeline)


@pytest.fixture
def store(s3_url: str, teacher: Teacher) -> Store:
    store = open_store(s3_url)
    prepare(store, teacher)
    return store


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    return tmp_path / "steps"


@pytest.fixture
def cluster(store: Store, steps: Path) -> Iterator[Any]:
    """Its head has no room for workers."""
    with machines(head_cpus=0, runtime_env=probing(steps)) as started:
        yield started


@dataclass
class Once:
    """Does something once when training has come so far, in hundredths."""

    part: int
    do: Callable[[], object]
    done: list[object] = field(default_factory=list)

    def update(self, done: int, total: int, **facts: float | str) -> None:
        if done >= self.part and not self.done:
            self.done.append(self.do())


def is_whole(store: Store, teacher: Teacher, recovered: Recovery) -> None:
    """Every step is the step of a run on one process, and nothing is left over."""
    assert recovered.failed is None
    alone = alone_losses(store, teacher, recovered)
    assert read_json(store, prefix_of(recovered), LOSSES) == pytest.approx(alone, rel=1e-3)
    load_student(store, recovered.student, teacher)
    assert not [key for key in store.keys("sweeps") if "/checkpoints/" in key]
    everything_is_published(store)


def test_a_machine_is_told_that_it_goes(
    cluster: Any, store: Store, teacher: Teacher, steps: Path, tmp_path: Path, row: Row
) -> None:
    with joined(cluster, 2, grace=60, log=tmp_path / "first.log") as first:

        def tell() -> None:
            cluster.add_node(num_cpus=2)
            first.terminate()

        once = Once(30, tell)
        (recovered,) = recover_tiny(store, teacher, once, finalists=1, checkpoint_every=EVERY)
        first.wait(60)
    assert once.done
    before, after = attempts(steps)
    assert 0 < before.end < STEPS
    assert (before.first, after.first, after.end) == (0, before.end, STEPS)
    assert lost([before, after]) == [0]
    is_whole(store, teacher, recovered)
    row(
        "machine told to go (SIGTERM to ray start)",
        f"saved at step {before.end}, went on from it elsewhere: 0 steps lost",
    )


def test_a_worker_is_told_that_it_goes(
    cluster: Any, store: Store, teacher: Teacher, steps: Path, row: Row
) -> None:
    cluster.add_node(num_cpus=2)

    def tell() -> None:
        os.kill(worker(), signal.SIGTERM)

    (recovered,) = recover_tiny(store, teacher, Once(30, tell), finalists=1, checkpoint_every=EVERY)
    before, after = attempts(steps)
    assert 0 < before.end < STEPS
    assert (before.first, after.first, after.end) == (0, before.end, STEPS)
    is_whole(store, teacher, recovered)
    row("worker SIGTERMed", f"saved at step {before.end}, went on from it: 0 steps lost")


@pytest.mark.parametrize("workers", [2, (1, 3)])
def test_a_machine_is_lost(
    cluster: Any, store: Store, teacher: Teacher, steps: Path, row: Row, workers: Any
) -> None:
    most = workers if isinstance(workers, int) else workers[1]
    node = cluster.add_node(num_cpus=most)

    def lose() -> None:
        cluster.add_node(num_cpus=1)
        cluster.remove_node(node, allow_graceful=False)

    (recovered,) = recover_tiny(store, teacher, Once(30, lose), finalists=1, workers=workers)
    before, *_, after = attempts(steps)
    assert 0 < before.end < STEPS
    assert after.end == STEPS
    assert 0 < after.first <= before.end
    (again,) = lost(attempts(steps))
    assert again <= 20
    assert before.workers == most
    assert after.workers == 2
    is_whole(store, teacher, recovered)
    row(
        f"machine lost under {most} workers",
        f"went on with {after.workers} elsewhere from its checkpoint: {again} steps taken again",
    )


def test_a_machine_comes(
    cluster: Any,
    store: Store,
    teacher: Teacher,
    steps: Path,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Otherwise one processor has room for several workers.
    share = Share(num_cpus=1, num_gpus=0, threads=1, device="cpu")
    monkeypatch.setattr("search.recover.placed", lambda *_: ((1, 2), share))
    cluster.add_node(num_cpus=1)

    def come() -> None:
        hold_steps(steps, workers=2)
        cluster.add_node(num_cpus=1)

    (recovered,) = recover_tiny(store, teacher, Once(30, come), finalists=1)
    before, after = attempts(steps)
    assert (before.workers, after.workers) == (1, 2)
    assert 0 < after.first <= before.end < after.end == STEPS
    (again,) = lost([before, after])
    assert again <= 10
    is_whole(store, teacher, recovered)
    row(
        "machine comes (1 to 2 workers)",
        f"went on with both from its checkpoint: {again} steps taken again",
    )


def worker() -> int:
    """The process of a recovery's worker."""
    import ray._private.state

    actors = ray._private.state.actors().values()
    pids = [a["Pid"] for a in actors if a["ActorClassName"] == "RayTrainWorker"]
    return next(pid for pid in pids if Path(f"/proc/{pid}").exists())
