"""Trying again what failed in passing, with exponential backoff and full jitter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Waits of up to 0.2, 0.4, 0.8 … 20 s, half of it on average: 8 attempts outlast a store that
# answers nothing for 12 s; ranks that failed together do not come back together.
_FIRST_SECONDS = 0.2
_LONGEST_SECONDS = 20.0


def retried(
    act: Callable[[], Result], passing: Callable[[Exception], bool], attempts: int
) -> Result:
    """What `act` returns at the first attempt that succeeds.

    Raises what the last attempt raised, or at once what `passing` says will not pass by itself.
    """
    for attempt in range(attempts - 1):
        try:
            return act()
        except Exception as error:
            if not passing(error):
                raise
        time.sleep(random.uniform(0, min(_LONGEST_SECONDS, _FIRST_SECONDS * 2**attempt)))
    return act()
