"""How a trial and its crew bear lost workers, without Ray; on Ray itself in test_recover.py."""

from __future__ import annotations

from typing import Any

import pytest

from search import racing
from search.racing import Fleet, RecoveryTrial
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
