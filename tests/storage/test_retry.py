from __future__ import annotations

from types import SimpleNamespace

import pytest

import storage.retry
from storage.retry import Patience, retried


@pytest.fixture
def waits(monkeypatch):
    """What was waited, each wait as long as it may be; no other time passes."""
    slept: list[float] = []
    monkeypatch.setattr(storage.retry, "time", SimpleNamespace(monotonic=lambda: sum(slept)))
    never = SimpleNamespace(wait=slept.append, is_set=lambda: False)
    monkeypatch.setattr(storage.retry, "_hurried", never)
    monkeypatch.setattr(storage.retry, "random", SimpleNamespace(uniform=lambda low, high: high))
    return slept


class Failing:
    def __init__(self, times):
        self.left = times

    def __call__(self):
        if self.left:
            self.left -= 1
            raise OSError(f"{self.left} more")
        return "done"


def test_what_passes_is_tried_again(waits):
    assert retried(Failing(3), lambda error: True, Patience(4, 0)) == "done"
    assert len(waits) == 3


def test_the_last_attempts_error_is_raised(waits):
    with pytest.raises(OSError, match="6 more"):
        retried(Failing(10), lambda error: True, Patience(4, 0))


def test_what_does_not_pass_is_raised_at_once(waits):
    with pytest.raises(OSError, match="9 more"):
        retried(Failing(10), lambda error: False, Patience(4, 99))
    assert waits == []


def test_waits_grow_up_to_a_longest(waits):
    retried(Failing(9), lambda error: True, Patience(10, 0))
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20]


def test_waits_differ(waits, monkeypatch):
    drawn = []
    monkeypatch.setattr(storage.retry.random, "uniform", lambda *ends: drawn.append(ends) or 0)
    retried(Failing(2), lambda error: True, Patience(3, 0))
    assert drawn == [(0, 0.2), (0, 0.4)]


def test_what_passes_is_tried_for_so_many_seconds_at_least(waits):
    with pytest.raises(OSError, match="more"):
        retried(Failing(99), lambda error: True, Patience(2, 100))
    assert 100 <= sum(waits) < 120
    assert max(waits) == 20
