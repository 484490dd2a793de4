"""The commands of `espalier`, as the parser that the command line is made of has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from cluster.cli.main import app

ROOT: Any = get_command(app)


def commands(
    group: Any = ROOT, before: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command with the words that it is called by, those of groups among them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command
