"""Trying again what failed in passing, with exponential backoff and full jitter."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")

# Waits of up to 0.2, 0.4, 0.8 … 20 s, half of it on average: ranks that failed together do not come
# back together.
_FIRST_SECONDS = 0.2
_LONGEST_SECONDS = 20.0


_hurried = threading.Event()


class Patience(NamedTuple):
    """When to give up: after so many attempts, but not before so many seconds have passed."""

    attempts: int
    seconds: float


def hurry() -> None:
    """From now on nothing in this process is tried again: whoever ends it shall not wait for a
    store that is out."""
    _hurried.set()


def retried(
    act: Callable[[], Result], passing: Callable[[Exception], bool], patience: Patience
) -> Result:
    """What `act` returns at the first attempt that succeeds.

    Raises what the last attempt raised, or at once what `passing` says will not pass by itself.
    """
    begun, left, longest = time.monotonic(), patience.attempts, _FIRST_SECONDS
    while True:
        try:
            return act()
        except Exception as error:
            left -= 1
            over = left <= 0 and time.monotonic() - begun >= patience.seconds
            if over or _hurried.is_set() or not passing(error):
                raise
        _hurried.wait(random.uniform(0, longest))
        longest = min(_LONGEST_SECONDS, 2 * longest)
