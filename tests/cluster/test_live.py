from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from cluster.connect import core_kept_quiet
from cluster.live import (
    LINE_EVERY,
    LinesView,
    Mode,
    Pace,
    TerminalView,
    duration,
    live_view,
    time_left,
)


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_most_every_few_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    view = LinesView(out, clock)
    progress = view.stage("library")
    for step in range(1, 11):
        clock.now += LINE_EVERY / 4
        progress.update(step, 10, loss=0.125)
    view.finish("library", "10 replacements", clock.now)
    lines = out.getvalue().splitlines()
    assert lines[1] == "library  4/10 7.5 s left loss 0.125"
    assert lines[-1] == "library  12.5 s: 10 replacements"
    assert len(lines) == 4


def test_json_is_an_object_a_line() -> None:
    out = io.StringIO()
    with live_view("json", ["encode", "analyse"], out) as view:
        view.finish("encode", "64 pictures", None)
        view.stage("analyse").update(1, 2, best=0.5)
        view.stop("analyse", "failed")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(event["stage"], event["event"]) for event in events] == [
        ("encode", "done"),
        ("analyse", "start"),
        ("analyse", "progress"),
        ("analyse", "failed"),
    ]
    assert events[0]["reused"] is True
    assert events[2]["best"] == 0.5


def test_the_terminal_shows_every_stage_and_what_runs() -> None:
    view = TerminalView(["encode", "search", "publish"], lambda: None, lambda _: None)
    view.finish("encode", "64 pictures", 3.0)
    view.stage("search").update(5, 20, best=0.031)
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(view)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    for words in ("64 pictures", "3.0 s", "5/20", "best 0.031", "publish", "waiting"):
        assert words in shown


@pytest.mark.parametrize("mode", ["live", "lines", "json"])
def test_a_warning_is_seen_while_stderr_is_kept_back(mode: Mode) -> None:
    out = io.StringIO()
    with live_view(mode, ["encode"], out) as view, core_kept_quiet():
        view.warn("track.mlflow: could not be written to")
    assert "track.mlflow: could not be written to" in out.getvalue()


def test_time_left_is_unknown_before_the_first_step() -> None:
    assert time_left(0, 10, 5.0) == ""
    assert time_left(5, 10, 5.0) == "5.0 s left"


def test_what_earlier_attempts_finished_makes_nothing_faster() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left(0, 100) == ""
    pace.note(90)  # as it was found
    assert pace.left(90, 100) == ""
    clock.now = 8.0
    pace.note(92)
    assert pace.left(92, 100) == "32.0 s left"
    out = io.StringIO()
    progress = LinesView(out, clock).stage("encode")
    progress.update(90, 100)
    clock.now += 8.0
    progress.update(92, 100)
    assert out.getvalue().splitlines()[-1] == "encode   92/100 32.0 s left"


def test_durations() -> None:
    assert [duration(s) for s in (0.0, 59.0, 60.0, 3600.0)] == [
        "0.0 s",
        "59.0 s",
        "1 min 0 s",
        "1 h 0 min",
    ]
