"""How long work tells whoever watches how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by long work after each unit of it; must return quickly and never raise."""

    def update(self, done: int, total: int, **facts: float | str) -> None:
        """`done` of `total` units are finished; `facts` are worth showing beside the bar."""
        ...


class _Silent:
    def update(self, done: int, total: int, **facts: float | str) -> None:
        pass


def silent() -> Progress:
    """A progress that shows nothing."""
    return _Silent()
