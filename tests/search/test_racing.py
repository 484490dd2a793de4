"""How a trial and its crew bear lost workers, without Ray; on Ray itself in test_recover.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import WorkerGroupError

from search import racing
from search.racing import Crew, Fleet, RecoveryTrial
from storage.errors import StoreError
from storage.manifest import publish
from storage.store import StoreOptions, open_store
from trainers.desk import State
from trainers.placement import Share

FLEET = Fleet("", 1, 1, retries=2, share=Share(1.0, 0.0, 1, "cpu"))


class Idle:
    """A crew that finishes whatever it is given, unless it has been lost."""

    def __init__(self, fleet: Fleet) -> None:
        self.error: BaseException | None = None
        self.jobs: list[Any] = []

    def put(self, job: Any) -> None:
        self.jobs.append(job)

    def look(self) -> State:
        return State({}, finished=self.error is None, attempts=1)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> RecoveryTrial:
    monkeypatch.setattr(racing, "Crew", Idle)
    trial = RecoveryTrial.__new__(RecoveryTrial)  # what Tune does besides needs Ray
    trial.setup({"job": {"number": 1}}, FLEET)
    return trial


def test_a_crew_serves_one_trial_after_another(trial: RecoveryTrial) -> None:
    assert trial.step() == {"done": True}
    crew: Any = trial._crew
    trial.reset_config({"job": {"number": 2}})
    assert trial.step() == {"done": True}
    assert trial._crew is crew
    assert crew.jobs == [{"number": 1}, {"number": 2}]


def test_a_crew_that_was_lost_between_two_jobs_is_not_given_the_next(trial: RecoveryTrial) -> None:
    trial.step()
    lost: Any = trial._crew
    lost.error = RuntimeError("its workers were lost")
    trial.reset_config({"job": {"number": 2}})
    assert trial.step() == {"done": True}
    found: Any = trial._crew
    assert (lost.jobs, found.jobs) == ([{"number": 1}], [{"number": 2}])


def test_a_store_that_the_trial_cannot_open_is_what_it_ends_with(
    trial: RecoveryTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: Idle, job: Any) -> None:
        raise StoreError("s3://b: no AWS credentials")

    monkeypatch.setattr(Idle, "put", put)
    assert trial.step() == {"broken": "s3://b: no AWS credentials", "done": True}


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Crew]:
    """Makes a crew from what each of its runs does, an error that it raises or what it returns."""

    def make(*runs: Callable[[], bool]) -> Crew:
        left = list(runs)
        trainer = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=left.pop(0)()))
        crew = Crew.__new__(Crew)  # what it does besides needs Ray
        crew._fleet, crew._desk, crew.error = FLEET, SimpleNamespace(put=Remote()), None
        monkeypatch.setattr(crew, "_trainer", lambda: trainer)
        return crew

    return make


class Remote:
    """A method of an actor that nobody hears."""

    def remote(self, *_: Any) -> None: ...


def lost() -> bool:
    raise WorkerGroupError("lost", {0: RuntimeError("closed by peer")})


def test_retries_are_counted_anew_when_there_is_a_new_checkpoint(
    tmp_path: Path, crew: Callable[..., Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    job = {"store": store.url, "options": StoreOptions(), "checkpoints": "run/checkpoints"}
    monkeypatch.setattr(racing.RecoveryJob, "model_validate", lambda job: SimpleNamespace(**job))

    def lost_after(step: int) -> Callable[[], bool]:
        def run() -> bool:
            publish(store, f"run/checkpoints/step-{step:09d}", {})
            return lost()

        return run

    through = crew(lost_after(6), lambda: False, lost_after(9), lambda: True)
    through.put(job)
    through._work()
    assert through.error is None
    stuck = crew(lost_after(12), lost)
    stuck.put(job)
    stuck._work()
    assert isinstance(stuck.error, WorkerGroupError)
