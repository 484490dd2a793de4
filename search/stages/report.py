"""Stage 7: the report page, from whatever the sweep has so far."""

from __future__ import annotations

import tempfile
from pathlib import Path

from search.report.gather import gather
from search.report.page import PAGE, write_report
from search.stages.publish import PUBLISH
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep
from storage import layout
from storage.digest import digest_json
from storage.manifest import publish
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    return Outcome(render(sweep, None), {})


def render(sweep: Sweep, out: Path | None) -> str:
    """Writes page and pictures into the store, and into a folder if one is given; returns where
    the page is."""
    with tempfile.TemporaryDirectory(prefix="espalier-report-") as scratch:
        folder = out or Path(scratch)
        files = write_report(gather(sweep), folder)
        prefix = layout.report(sweep.name)
        publish(sweep.store, prefix, {file.name: file for file in files})
    return str(out / PAGE) if out else f"{shown_url(sweep)}/{prefix}/{PAGE}"


def shown_url(sweep: Sweep) -> str:
    """The storage as a person opens it: a path for a folder."""
    return sweep.store.url.removeprefix("file://")


REPORT = Stage(
    name="report",
    digest=lambda sweep: digest_json([PUBLISH.digest(sweep), "report"]),
    run=run,
    parts=lambda sweep: [layout.report(sweep.name)],
    placed=lambda _: True,
)
