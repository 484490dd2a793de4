"""Workers report at most once a second, all or none."""

from __future__ import annotations

from typing import Any

import pytest

from trainers.reporting import Reporter


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray Train would be told."""
    import ray.train

    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.train, "report", lambda facts, **how: found.append(facts))
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr("trainers.reporting.time.monotonic", lambda: now[0])
    return now


def test_reports_keep_a_second_apart(told, clock):
    reporter = Reporter(lambda mine: mine)
    for step in range(30):
        clock[0] += 0.25
        reporter.tell_now_and_then({"step": step})
    assert [facts["step"] for facts in told] == [4, 9, 14, 19, 24, 29]
    reporter.tell({"step": 30})
    assert told[-1] == {"step": 30}


def test_a_worker_follows_what_all_agree_on(told, clock):
    asked: list[bool] = []
    reporter = Reporter(lambda mine: asked.append(mine) or False)
    clock[0] += 5
    reporter.tell_now_and_then({"step": 1})
    assert (asked, told) == ([True], [])
