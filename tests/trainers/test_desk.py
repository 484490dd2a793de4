"""What lies on a desk between those who have work and those who do it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from trainers.desk import Desk, Line, State, Taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr("trainers.desk.time.monotonic", lambda: now[0])
    return now


def called_here(desk: Desk) -> Any:
    """The desk as an actor's handle looks."""
    names = ("take", "tell", "finish")
    return SimpleNamespace(**{n: SimpleNamespace(remote=getattr(desk, n)) for n in names})


def test_a_job_stays_until_it_is_finished() -> None:
    desk = Desk()
    assert desk.take() == Taken(None, closed=False)
    desk.put({"step": 1})
    assert desk.take() == desk.take() == Taken({"step": 1}, closed=False)
    desk.tell({"loss": 0.5})
    assert desk.look() == State({"loss": 0.5}, finished=False, attempts=2)
    desk.finish()
    assert desk.take() == Taken(None, closed=False)
    assert desk.look() == State({"loss": 0.5}, finished=True, attempts=2)


def test_the_next_job_knows_nothing_of_the_one_before() -> None:
    desk = Desk()
    desk.put({"step": 1})
    desk.take()
    desk.tell({"loss": 0.5})
    desk.put({"step": 2})
    assert desk.look() == State({}, finished=False, attempts=0)


def test_work_that_is_there_is_done_before_a_closed_desk_is_left() -> None:
    desk = Desk()
    desk.put({"step": 1})
    desk.close()
    assert desk.take() == Taken({"step": 1}, closed=True)
    desk.finish()
    assert desk.take() == Taken(None, closed=True)


def test_what_a_first_rank_tells_keeps_a_second_apart(clock: list[float]) -> None:
    desk, found = Desk(), []
    line = Line(called_here(desk), rank=0)
    for step in range(30):
        clock[0] += 0.25
        line.tell({"step": step})
        found.append(desk.look().facts.get("step"))
    assert sorted({*found} - {None}) == [3, 7, 11, 15, 19, 23, 27]


def test_other_ranks_are_silent(clock: list[float]) -> None:
    desk = Desk()
    desk.put({"step": 1})
    line = Line(called_here(desk), rank=1)
    clock[0] += 5
    line.tell({"step": 1})
    line.finish()
    assert line.take() == Taken(None, closed=False)
    assert desk.look() == State({}, finished=False, attempts=0)


def test_a_first_rank_waits_for_work_a_while(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    desk, slept = Desk(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds
        if len(slept) == 2:
            desk.put({"step": 1})

    monkeypatch.setattr("trainers.desk.time.sleep", sleep)
    line = Line(called_here(desk), rank=0)
    assert line.take().job == {"step": 1}
    desk.finish()
    slept[:] = [0.0, 0.0]
    assert line.take() == Taken(None, closed=False)
    assert 0.9 < sum(slept) < 1.2
