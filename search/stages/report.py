"""Stage 7: the report page, from whatever the sweep has so far."""

from __future__ import annotations

import tempfile
from pathlib import Path

from search.report.gather import gather
from search.report.page import PAGE, write_report
from search.stages.publish import PUBLISH
from search.stages.recover import left_out
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep, SweepError
from storage import layout
from storage.digest import digest_json
from storage.manifest import publish
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    """The last stage: what a sweep has to say against itself is said when all else is done."""
    url = render(sweep, None)
    lost = left_out(sweep)
    if lost:
        each = "; ".join(
            f"budget {budget}: every recovery failed, {lost[budget]}" for budget in lost
        )
        raise SweepError(
            f"{each}; the other budgets are published and {url} shows them; change `recover`, or "
            "run the sweep again to try once more"
        )
    return Outcome(url, {})


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
    placed=lambda _: True,
)
