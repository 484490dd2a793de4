"""What the workers of a Ray Train job do between one recovery and the next; the recoveries
themselves are in tests/search/test_recover.py."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from storage.manifest import publish
from storage.store import StoreOptions, open_store
from trainers import worker
from trainers.desk import Taken


class Model:
    """Holds itself, as a module and the hooks on it do."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What lies on the desk, in its order, seen by the only worker; it is closed afterwards."""
    left: list[Any] = []
    line = SimpleNamespace(
        take=lambda: Taken(left.pop(0), closed=False) if left else Taken(None, closed=True),
        tell=lambda facts: None,
        finish=lambda: None,
    )
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(worker, "Line", lambda desk, rank: line)
    monkeypatch.setattr(worker, "_from_first_rank", lambda taken: taken)
    monkeypatch.setattr(worker.RecoveryJob, "model_validate", lambda job: job)
    return left


def test_jobs_are_done_in_turn_until_the_desk_is_closed(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(worker, "run_job", lambda job, *_: done.append(job) or True)
    found += [{"step": 1}, None, {"step": 2}]
    assert worker.train_loop({"desk": None}) is True
    assert done == [{"step": 1}, {"step": 2}]


def test_a_worker_that_leaves_does_not_take_the_next_job(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "run_job", lambda job, *_: False)
    found += [{"step": 1}, {"step": 2}]
    assert worker.train_loop({"desk": None}) is False
    assert found == [{"step": 2}]


def test_what_a_job_held_is_let_go_before_the_next(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Model]] = []
    alive: list[int] = []

    def run(*_: Any) -> bool:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(Model()))
        return True

    monkeypatch.setattr(worker, "run_job", run)
    found += [{"step": 1}, {"step": 2}, {"step": 3}]
    gc.disable()
    try:
        worker.train_loop({"desk": None})
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_what_a_lost_attempt_left_of_its_student_is_cleared_away(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = open_store(s3_url)
    for prefix in ("run/student", "other/student"):
        store._call("create_multipart_upload", Key=f"{store._prefix}/{prefix}/w")
    job = worker.RecoveryJob.model_construct(
        store=store.url, options=StoreOptions(), prefix="run/end", student="run/student", until=9,
        schedule=SimpleNamespace(steps=9), timeout=1.0,
    )  # fmt: skip

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # The watchdog is the first thing that a job starts once it is to run.
    monkeypatch.setattr("faulthandler.dump_traceback_later", stop)
    for rank, left in ((1, ["other/student/w", "run/student/w"]), (0, ["other/student/w"])):
        with pytest.raises(KeyboardInterrupt):
            worker.run_job(job, rank, 2, lambda facts: None)
        assert [upload.key for upload in store.unfinished("")] == left


@pytest.mark.parametrize(("until", "left"), [(4, True), (9, False)])
def test_an_attempt_that_was_lost_at_its_very_end_is_only_cleared_up_after(
    tmp_path: Path, until: int, left: bool
) -> None:
    store = open_store(str(tmp_path))
    publish(store, "run/checkpoints/step-000000004", {"state.json": b"{}"})
    outcome = worker.RecoveryOutcome(fidelity_loss=0.5, seconds=1.0, steps=until)
    publish(store, "run/end", {}, outcome.model_dump(mode="json"))
    job = worker.RecoveryJob.model_construct(
        store=store.url, options=StoreOptions(), prefix="run/end", checkpoints="run/checkpoints",
        until=until, schedule=SimpleNamespace(steps=9),
    )  # fmt: skip
    for rank in (1, 0):
        assert worker.run_job(job, rank, 2, lambda facts: None) is True
    # Who may still go on from there needs its checkpoint.
    assert bool(list(store.keys("run/checkpoints"))) is left
