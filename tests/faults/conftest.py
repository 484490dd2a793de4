"""`make test-faults`: every fault's row, in one table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.faults.proxy import Proxy, proxying
from tests.s3 import S3Server


class Row(Protocol):
    def __call__(self, fault: str, done: str) -> None:
        """Called at a test's end, when nothing was lost."""


@pytest.fixture
def row(record_property: Any) -> Row:
    def add(fault: str, done: str) -> None:
        record_property("fault", (fault, done))

    return add


@pytest.fixture
def proxy(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """In front of the server; the environment's endpoint is the proxy's."""
    with proxying(s3_server.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        yield between


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows: list[tuple[str, str, str]] = []
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when not in ("call", "setup") or "/faults/" not in report.nodeid:
                continue
            said = dict(report.user_properties).get("fault")
            if outcome == "passed" and said:
                rows.append((*said, "nothing"))
            elif outcome == "failed":
                rows.append((report.nodeid.split("::")[-1], "see above", "FAILED"))
            elif outcome == "skipped":
                rows.append((report.nodeid.split("::")[-1], str(report.longrepr[-1]), "skipped"))
    if not rows:
        return
    terminalreporter.section("faults")
    heads = ("fault", "what was done", "lost")
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(3)]
    for row in [heads, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
