"""Where the workers of a Ray Train job get one recovery after another, and tell how it goes.

A short recovery is mostly start-up: processes that import torch and Ray. So workers stay, and
between them and whoever has work for them stands this actor. They tell it what they have to say
without waiting: a report through Ray Train would hold the next one up until its driver looks.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

_SECONDS = 1.0
"""Between what workers tell."""
_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0


class Taken(NamedTuple):
    """What a worker finds on the desk."""

    job: dict[str, Any] | None
    """What is to be done, again if an attempt at it broke off; None when there is nothing yet."""
    closed: bool
    """Nothing will come any more."""


class State(NamedTuple):
    """How the latest job stands."""

    facts: dict[str, Any]
    """What was told last."""
    finished: bool
    attempts: int
    """How often workers have begun it."""


class Desk:
    """The actor: one job at a time."""

    def __init__(self) -> None:
        self._job: dict[str, Any] | None = None
        self._closed = False
        self._state = State({}, False, 0)

    def put(self, job: dict[str, Any]) -> None:
        """The next job; the one before is finished or given up."""
        self._job, self._state = job, State({}, False, 0)

    def take(self) -> Taken:
        """What there is to do. A job stays until it is finished: workers that start again after a
        failure find it here."""
        if self._job is not None:
            self._state = self._state._replace(attempts=self._state.attempts + 1)
        return Taken(self._job, self._closed)

    def tell(self, facts: dict[str, Any]) -> None:
        """How far it has come."""
        self._state = self._state._replace(facts=facts)

    def finish(self) -> None:
        """It has come to its end, well or not."""
        self._job, self._state = None, self._state._replace(finished=True)

    def close(self) -> None:
        """Workers may go once they have finished."""
        self._closed = True

    def look(self) -> State:
        """How it stands."""
        return self._state


class Line:
    """A first rank's line to the desk; another rank's is silent."""

    def __init__(self, desk: Any, rank: int) -> None:
        self._desk = desk if rank == 0 else None
        self._told = time.monotonic()

    def take(self) -> Taken:
        """What there is to do, after a second at most; nothing for other ranks."""
        import ray

        found, until = Taken(None, False), time.monotonic() + _PATIENCE_SECONDS
        while self._desk is not None and found.job is None and not found.closed:
            found = ray.get(self._desk.take.remote())
            if time.monotonic() > until:
                break
            time.sleep(_LOOK_SECONDS)
        return found

    def tell(self, facts: dict[str, Any]) -> None:
        """Tell, unless the last time was less than a second ago. Waits for nobody."""
        if self._desk is not None and time.monotonic() - self._told >= _SECONDS:
            self._told = time.monotonic()
            self._desk.tell.remote(facts)

    def finish(self) -> None:
        """The job has come to its end."""
        import ray

        if self._desk is not None:
            ray.get(self._desk.finish.remote())
