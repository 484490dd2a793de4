"""What a stage of a sweep leaves about itself: that it is done, for what input, and at what cost.

The record is the stage's manifest: it is written last, and a stage counts as done when there is a
record for its present input, and what that says was made is still published. Time of attempts that
were cut off is kept beside it as they run.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from math import isfinite

from pydantic import AwareDatetime, Field, JsonValue, NonNegativeFloat, PositiveInt, ValidationError

from storage import layout
from storage.errors import MissingKey
from storage.manifest import publish, published
from storage.section import Section
from storage.store import Store
from trainers.progress import Progress

SAVE_EVERY = 10.0
"""Seconds between two notes of a running stage's time: what SIGKILL can make it forget."""


class StageRecord(Section):
    """One finished stage of a sweep."""

    stage: str
    """Its name."""
    digest: str
    """Of everything it depends on."""
    started: AwareDatetime
    """When its first attempt began."""
    seconds: NonNegativeFloat
    """Wall time of all its attempts together."""
    workers: PositiveInt
    """Processes it was spread over."""
    summary: str
    """What it did, in a few words."""
    reused: bool = False
    """Whether its output was there already, made by another sweep."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What later stages and the report need to know of it."""


class Attempt(Section):
    """A stage that has begun and has no record yet."""

    digest: str
    started: AwareDatetime
    seconds: NonNegativeFloat
    """Wall time so far, of this attempt and those before it."""
    done: int = 0
    """Units finished when this was noted."""
    total: int = 0
    facts: dict[str, float | str] = Field(default_factory=dict)
    """What was shown beside them, such as the best so far."""


def read_record(store: Store, sweep: str, stage: str) -> StageRecord | None:
    """The last finished run of a stage, whatever its input was."""
    manifest = published(store, layout.stage(sweep, stage))
    return None if manifest is None else StageRecord.model_validate(manifest.meta)


def write_record(store: Store, sweep: str, record: StageRecord) -> None:
    """From here on the stage is done."""
    publish(store, layout.stage(sweep, record.stage), {}, record.model_dump(mode="json"))
    store.remove(layout.attempt(sweep, record.stage))


def read_attempt(store: Store, sweep: str, stage: str) -> Attempt | None:
    """The attempt that has not come to its end, if any."""
    try:
        with store.read(layout.attempt(sweep, stage)) as stream:
            return Attempt.model_validate_json(stream.read())
    except (MissingKey, ValidationError):  # a note about time is not worth stopping for
        return None


class Stopwatch:
    """A Progress that passes everything on and keeps note of the time a stage takes."""

    def __init__(self, store: Store, sweep: str, stage: str, digest: str, shown: Progress) -> None:
        self._store, self._key, self._shown = store, layout.attempt(sweep, stage), shown
        earlier = read_attempt(store, sweep, stage)
        same = earlier is not None and earlier.digest == digest
        self._before = earlier.seconds if earlier and same else 0.0
        self.started = earlier.started if earlier and same else datetime.now(UTC)
        self._digest = digest
        self._begun = time.monotonic()
        self._saved = self._begun
        self._done, self._total = 0, 0
        self._facts: dict[str, float | str] = {}
        self.save()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self._done, self._total, self._facts = done, total, facts
        self._shown.update(done, total, **facts)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Notes the time so far."""
        self._saved = time.monotonic()
        attempt = Attempt(
            digest=self._digest, started=self.started, seconds=round(self.seconds, 2),
            done=self._done, total=self._total,
            # JSON has no NaN.
            facts={n: v for n, v in self._facts.items() if isinstance(v, str) or isfinite(v)},
        )  # fmt: skip
        self._store.write(self._key, attempt.model_dump_json().encode())
