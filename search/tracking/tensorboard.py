"""Event files for TensorBoard, one a series.

TensorBoard lists every folder as a run, so the trials of a search are points of a few series and
not thousands of runs. A file is named by what is in it: one that is there already is left alone,
and those of a sweep's earlier searches give way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search.tracking.runs import Run
from storage.digest import digest_json

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event

MARK = "espalier"


def write(runs: Sequence[Run], folder: Path, sweep: str) -> None:
    """Makes the event files of all series of a sweep under `folder`, where they are missing."""
    kept = set()
    ordered = sorted(runs, key=lambda run: (run.series, run.step))
    for series, group in itertools.groupby(ordered, key=lambda run: run.series):
        kept.add(_write_series(list(group), folder / series))
    for file in (folder / sweep).rglob(f"events.out.tfevents.*.{MARK}.*"):
        if file not in kept:
            file.unlink()


def _write_series(runs: Sequence[Run], folder: Path) -> Path:
    from tensorboardX.record_writer import RecordWriter

    digest = digest_json([run.key for run in runs])
    # TensorBoard reads a folder's files in the order of their names.
    began = int(min(run.started for run in runs).timestamp())
    file = folder / f"events.out.tfevents.{began}.{MARK}.{digest}"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # Not yet by a name that TensorBoard looks for.
    part = folder / f"{digest}.part"
    writer = RecordWriter(str(part))
    for event in _events(runs):
        writer.write(event.SerializeToString())
    writer.close()
    return part.rename(file)


def _events(runs: Sequence[Run]) -> Iterable[Event]:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams, scalar

    yield Event(wall_time=runs[0].started.timestamp(), file_version="brain.Event:2")
    for run in runs:
        begun, ended = run.started.timestamp(), run.started.timestamp() + run.seconds
        # Choices have their place in TensorBoard's table where a series is one run.
        if run.curves:
            last = {_tag(run, name): curve[-1][1] for name, curve in run.curves.items() if curve}
            for summary in hparams(dict(run.choices), last):
                yield Event(wall_time=begun, summary=summary)
        for name, curve in run.curves.items():
            for step, value in curve:
                when = begun + run.seconds * step / max(run.step, 1)
                yield Event(wall_time=when, step=step, summary=scalar(_tag(run, name), value))
        for name, value in run.results.items():
            yield Event(wall_time=ended, step=run.step, summary=scalar(_tag(run, name), value))


def _tag(run: Run, name: str) -> str:
    """A chart of its own for every kind: a step is a trial in one and an optimizer's in another."""
    return f"{run.kind}/{name}".replace(" ", "_")
