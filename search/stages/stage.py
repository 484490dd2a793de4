"""A stage of a sweep, and what running one means: skipped when done, resumed when cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic import JsonValue

from search.stages.record import (
    StageRecord,
    Stopwatch,
    read_attempt,
    read_record,
    write_record,
)
from search.sweep import Sweep, SweepError
from storage.errors import EspalierError
from storage.manifest import all_published, published
from trainers.progress import Progress

StageState = Literal["done", "partial", "missing"]


class Outcome(NamedTuple):
    """What a stage says when it has come to its end."""

    summary: str
    """A few words: "30 replacements trained, 0 reused"."""
    facts: dict[str, JsonValue]


@dataclass(frozen=True)
class Stage:
    """One step of a sweep. `run` leaves its output in the store, and continues what it finds there
    of an attempt that was cut off; it may raise what it likes."""

    name: str
    digest: Callable[[Sweep], str]
    """Of everything that its output depends on."""
    run: Callable[[Sweep, Progress], Outcome]
    shared: Callable[[Sweep], str] | None = None
    """Prefix of an output that belongs to no single sweep; its manifest says that it is there."""
    parts: Callable[[Sweep], Sequence[str]] = lambda _: ()
    """Prefixes that its output consists of, once it has come to its end. Each has a manifest of its
    own: when one is removed, because it was damaged, running the stage again makes it anew."""
    unfinished: Callable[[Sweep], bool] = lambda _: False
    """Whether it has come to its end without something that running it again may still bring; the
    stages after it do with what there is."""
    check: Callable[[Sweep], object] | None = None
    """Finds, before any worker starts, what is wrong with the stage's input."""
    check_cluster: Callable[[Sweep], object] | None = None
    """Finds, as soon as there is a cluster, that it has no room for the stage."""
    wanted: Callable[[Sweep], bool] = lambda _: True
    """Whether the stages after it need its output."""
    placed: Callable[[Sweep], bool] = lambda _: False
    """Whether it runs in this process unless models run on GPUs, see `place`."""
    workers: Callable[[Sweep], int] = lambda sweep: sweep.config.workers
    """Processes that it is spread over, where it is."""

    def spread(self, sweep: Sweep) -> int:
        """Processes that it is spread over."""
        return 1 if self.placed(sweep) else self.workers(sweep)

    def needs_cluster(self, sweep: Sweep) -> bool:
        return not self.placed(sweep) or sweep.config.accelerator == "gpu"

    def ended(self, sweep: Sweep) -> bool:
        """Whether it has come to its end, and what it made is still there."""
        if self.shared is not None:
            ended = published(sweep.store, self.shared(sweep)) is not None
        else:
            ended = self.record(sweep) is not None
        return ended and all_published(sweep.store, self.parts(sweep))

    def state(self, sweep: Sweep) -> StageState:
        if self.ended(sweep):
            return "partial" if self.unfinished(sweep) else "done"
        attempt = read_attempt(sweep.store, sweep.name, self.name)
        begun = attempt is not None and attempt.digest == self.digest(sweep)
        return "partial" if begun else "missing"

    def record(self, sweep: Sweep) -> StageRecord | None:
        """What this sweep noted when the stage was done for its present input."""
        record = read_record(sweep.store, sweep.name, self.name)
        return record if record is not None and record.digest == self.digest(sweep) else None


def run_stage(stage: Stage, sweep: Sweep, shown: Progress) -> StageRecord:
    """Runs a stage that is not done, and records it."""
    digest = stage.digest(sweep)
    # There when it had come to its end, and a part of its output was removed since or left out.
    before = stage.record(sweep)
    watch = Stopwatch(sweep.store, sweep.name, stage.name, digest, shown)
    try:
        outcome = stage.run(sweep, watch)
    except BaseException:
        with suppress(EspalierError):  # the first failure is the one to tell
            watch.save()
        raise
    record = StageRecord(
        stage=stage.name,
        digest=digest,
        started=before.started if before else watch.started,
        seconds=round(watch.seconds + (before.seconds if before else 0.0), 2),
        workers=stage.spread(sweep),
        summary=outcome.summary,
        facts=outcome.facts,
    )
    write_record(sweep.store, sweep.name, record)
    return record


def skip_stage(stage: Stage, sweep: Sweep) -> StageRecord:
    """The record of a stage that is done, written here when it has none yet.

    It has none when another sweep made its output, or when this one was killed between output and
    record; the time that was noted tells which.
    """
    record = stage.record(sweep)
    if record is not None:
        return record
    digest = stage.digest(sweep)
    attempt = read_attempt(sweep.store, sweep.name, stage.name)
    ours = attempt if attempt is not None and attempt.digest == digest else None
    record = StageRecord(
        stage=stage.name,
        digest=digest,
        started=ours.started if ours else datetime.now(UTC),
        seconds=ours.seconds if ours else 0.0,
        workers=stage.spread(sweep),
        summary="done before it was cut off" if ours else "made by another sweep",
        reused=ours is None,
    )
    write_record(sweep.store, sweep.name, record)
    return record


def require_earlier(stages: Sequence[Stage], stage: Stage, sweep: Sweep) -> None:
    """SweepError unless every stage before `stage` is done for this configuration."""
    for earlier in stages[: stages.index(stage)]:
        if earlier.wanted(sweep) and not earlier.ended(sweep):
            raise SweepError(
                f"{stage.name}: needs the output of `{earlier.name}`, which is not there for this "
                f"configuration; run `espalier {earlier.name}` first, or `espalier sweep` for all"
            )
