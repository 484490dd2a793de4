"""Shows long work as it goes: a live view on a terminal, plain lines elsewhere, or JSON lines.

with live_view("auto", stages) as view:
    progress = view.stage("library")
    progress.update(3, 30, loss=0.12)
    view.finish("library", "30 replacements", seconds=34.0)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Literal, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Fact = float | str
Mode = Literal["live", "lines", "json"]
Stop = Literal["failed", "interrupted"]

STYLES = {"waiting": "dim", "failed": "bold red", "interrupted": "yellow"}
"""Of a row of the live view; a finished stage's is green."""

LINE_EVERY = 5.0
"""Seconds between two plain lines of one stage: a log file is read by people."""
REDRAW_EVERY = 0.1
"""Seconds between two drawings of the live view; drawing costs the workers' processor time."""


class View(Protocol):
    """What a run tells about itself. Calls come from one thread, stages one after another."""

    def stage(self, name: str) -> StageProgress: ...
    def finish(self, name: str, summary: str, seconds: float | None) -> None:
        """`seconds` is None for a stage that had been done before."""

    def stop(self, name: str, how: Stop) -> None:
        """The stage has not come to its end."""

    def warn(self, sentence: str) -> None:
        """Something that stops nothing. Not for stderr, which is kept back while Ray runs."""


class StageProgress:
    """What a stage is given to report with: trainers.progress.Progress."""

    def __init__(self, show: Callable[[int, int, dict[str, Fact]], None]) -> None:
        self._show = show

    def update(self, done: int, total: int, **facts: Fact) -> None:
        self._show(done, total, facts)


@contextmanager
def live_view(mode: Mode, stages: Sequence[str], stream: IO[str] | None = None) -> Iterator[View]:
    """The view of this mode; what it has drawn stays on the screen when the block ends."""
    out = stream or sys.stdout
    if mode == "json":
        yield JsonView(out)
    elif mode == "lines":
        yield LinesView(out)
    else:
        yield from _on_terminal(stages, out)


def choose_mode(as_json: bool) -> Mode:
    if as_json:
        return "json"
    return "live" if sys.stdout.isatty() else "lines"


class JsonView:
    """One JSON object a line: {"stage", "event": "start" | "progress" | "done" |
    "failed" | "interrupted", ...}, and {"event": "warning", "warning"}."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def stage(self, name: str) -> StageProgress:
        self._say(stage=name, event="start")
        return StageProgress(
            lambda done, total, facts: self._say(
                stage=name, event="progress", done=done, total=total, **facts
            )
        )

    def finish(self, name: str, summary: str, seconds: float | None) -> None:
        self._say(
            stage=name, event="done", summary=summary, seconds=seconds, reused=seconds is None
        )

    def stop(self, name: str, how: Stop) -> None:
        self._say(stage=name, event=how)

    def warn(self, sentence: str) -> None:
        self._say(event="warning", warning=sentence)

    def _say(self, **event: object) -> None:
        print(json.dumps(event), file=self._out, flush=True)


class LinesView:
    """A line when a stage starts and ends, and one every few seconds between."""

    def __init__(self, out: IO[str], now: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._now = now

    def stage(self, name: str) -> StageProgress:
        last, pace = self._now(), Pace(self._now)
        self._say(f"{name:<8} …")

        def show(done: int, total: int, facts: dict[str, Fact]) -> None:
            nonlocal last
            pace.note(done)
            if self._now() - last >= LINE_EVERY:
                last = self._now()
                left = pace.left(done, total)
                self._say(f"{name:<8} {done}/{total} {left} {describe(facts)}".rstrip())

        return StageProgress(show)

    def finish(self, name: str, summary: str, seconds: float | None) -> None:
        took = "already there" if seconds is None else duration(seconds)
        self._say(f"{name:<8} {took}: {summary}")

    def stop(self, name: str, how: Stop) -> None:
        self._say(f"{name:<8} {how}")

    def warn(self, sentence: str) -> None:
        self._say(f"espalier: {sentence}")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class TerminalView:
    """The table that rich keeps in place: a row a stage, the running one with a bar."""

    def __init__(
        self,
        stages: Sequence[str],
        refresh: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._rows: dict[str, tuple[str, str]] = dict.fromkeys(stages, ("waiting", ""))
        self._refresh = refresh
        self._say = say
        self._running: tuple[str, float, Pace, int, int, dict[str, Fact]] | None = None
        self._drawn = 0.0

    def stage(self, name: str) -> StageProgress:
        started, pace = time.monotonic(), Pace()
        self._running = (name, started, pace, 0, 0, {})
        self._refresh()

        def show(done: int, total: int, facts: dict[str, Fact]) -> None:
            pace.note(done)
            self._running = (name, started, pace, done, total, facts)
            if time.monotonic() - self._drawn >= REDRAW_EVERY:
                self._drawn = time.monotonic()
                self._refresh()

        return StageProgress(show)

    def finish(self, name: str, summary: str, seconds: float | None) -> None:
        self._end(name, "already there" if seconds is None else duration(seconds), summary)

    def stop(self, name: str, how: Stop) -> None:
        self._end(name, how, "")

    def warn(self, sentence: str) -> None:
        self._say(f"espalier: {sentence}")

    def _end(self, name: str, state: str, summary: str) -> None:
        self._rows[name] = (state, summary)
        self._running = None
        self._refresh()

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=9)
        table.add_column(min_width=14, no_wrap=True)
        table.add_column(ratio=1)
        for name, (state, summary) in self._rows.items():
            if self._running is None or self._running[0] != name:
                style = {"waiting": "dim", "failed": "bold red", "interrupted": "yellow"}.get(
                    state, "green"
                )
                table.add_row(Text(name, style=style), Text(state, style=style), summary)
                continue
            _, started, pace, done, total, facts = self._running
            passed = time.monotonic() - started
            bar = ProgressBar(total=total or None, completed=done, width=24, pulse=not total)
            words = f"{done}/{total}  {pace.left(done, total)}  {describe(facts)}"
            inner = Table.grid(padding=(0, 1))
            inner.add_row(bar, words if total else describe(facts))
            table.add_row(Text(name, style="bold cyan"), duration(passed), inner)
        return table


def _on_terminal(stages: Sequence[str], out: IO[str]) -> Iterator[View]:
    console = Console(file=out)
    with Live(console=console, refresh_per_second=2) as live:
        # What the console prints while it is live comes to stand above the table.
        view = TerminalView(stages, live.refresh, lambda line: console.print(Text(line)))
        live.update(view)
        yield view


class Pace:
    """What a stage's units take, by those that were finished since its first report: that may
    begin with what earlier attempts had finished."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._first: tuple[int, float] | None = None

    def note(self, done: int) -> None:
        """To be told of every report."""
        if self._first is None:
            self._first = (done, self._now())

    def left(self, done: int, total: int) -> str:
        """The rest of the stage; empty before its second report."""
        if self._first is None:
            return ""
        before, since = self._first
        return time_left(done - before, total - before, self._now() - since)


def time_left(done: int, total: int, passed: float) -> str:
    """The rest of some work at the pace so far, empty before its first step."""
    if done <= 0 or total <= 0:
        return ""
    return f"{duration(passed / done * max(0, total - done))} left"


def duration(seconds: float) -> str:
    """
    >>> duration(4.21), duration(75), duration(7260)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def describe(facts: dict[str, Fact]) -> str:
    """Facts in a row: `best 50% 0.12   trials 40`."""
    return "   ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in facts.items()
    )
