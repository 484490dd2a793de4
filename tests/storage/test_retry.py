from __future__ import annotations

import pytest

import storage.retry
from storage.retry import retried


@pytest.fixture
def waits(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(storage.retry.time, "sleep", slept.append)
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
    assert retried(Failing(3), lambda error: True, 4) == "done"
    assert len(waits) == 3


def test_the_last_attempts_error_is_raised(waits):
    with pytest.raises(OSError, match="6 more"):
        retried(Failing(10), lambda error: True, 4)


def test_what_does_not_pass_is_raised_at_once(waits):
    with pytest.raises(OSError, match="9 more"):
        retried(Failing(10), lambda error: False, 4)
    assert waits == []


def test_waits_grow_up_to_a_longest_and_differ(waits, monkeypatch):
    monkeypatch.setattr(storage.retry.random, "uniform", lambda low, high: high)
    retried(Failing(9), lambda error: True, 10)
    assert waits[:4] == [0.2, 0.4, 0.8, 1.6]
    assert waits[-1] == 20
    monkeypatch.undo()
