"""Every command line that is written down somewhere is one that the command takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.verbs import ROOT, commands

LINE = re.compile(r"(?:^[#\s]*|Example: )(espalier .+)$", re.MULTILINE)
"""A line of its own in a block of code, a comment or a docstring, or the example in a sentence."""
SPAN = re.compile(r"`(espalier [^\s`]+\s[^`]+)`")
"""In a sentence of Markdown; a verb alone only names the command."""
CONTINUED = re.compile(r"\\\n[#\s]*")


def texts() -> Iterator[tuple[str, str]]:
    """Where command lines are written down, and what is written there."""
    for file in [Path("README.md"), *sorted(Path("examples").rglob("*.yaml"))]:
        yield str(file), file.read_text(encoding="utf-8")
    for file in sorted(Path("cluster/cli").glob("*.py")):
        yield str(file), ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    yield "espalier --help", ROOT.epilog
    for words, command in commands():
        # The docstring of its function, but for stages, whose help is made.
        yield f"espalier {' '.join(words)} --help", command.help


def written() -> Iterator[tuple[str, str]]:
    for place, text in texts():
        whole = CONTINUED.sub(" ", text)
        spans = SPAN.findall(whole) if place.endswith(".md") else []
        for line in (*LINE.findall(whole), *spans):
            yield place, " ".join(line.split())


WRITTEN = list(dict.fromkeys(written()))


def parse(line: str) -> None:
    """Parses a command line as the command does before it runs; raises what it would say."""
    words = shlex.split(line, comments=True)[1:]
    if "|" in words:
        words = words[: words.index("|")]
    command = ROOT
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{name}: no such command"
        command = command.commands[name]
    command.make_context(name, words)


@pytest.mark.parametrize(("place", "line"), WRITTEN, ids=map(": ".join, WRITTEN))
def test_a_command_line_that_is_written_down_is_taken(place: str, line: str) -> None:
    parse(line)


def test_all_that_is_written_down_is_found() -> None:
    places = {place for place, _ in WRITTEN}
    assert {"README.md", "cluster/cli/main.py", "espalier --help"} <= places
    assert {str(file) for file in Path("examples").rglob("*.yaml")} <= places
    assert {f"espalier {' '.join(words)} --help" for words, _ in commands()} <= places
