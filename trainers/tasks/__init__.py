"""Tasks: what generated pictures are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from trainers.tasks.shapes import Shapes

if TYPE_CHECKING:
    from PIL.Image import Image


class Task(Protocol):
    """Captions whose pictures can be said to be right or wrong."""

    @property
    def families(self) -> Sequence[str]:
        """The kinds of caption that are scored apart, in the order in which they are shown."""
        ...

    def judge(self, picture: Image, caption: str) -> bool:
        """Whether the picture shows exactly what the caption asks for."""
        ...

    def family(self, caption: str) -> str:
        """The family that a caption is scored under."""
        ...

    def held_out_captions(self, per_family: int, seed: int) -> list[str]:
        """Captions for combinations that training never shows, `per_family` of each family."""
        ...


TASKS: dict[str, Task] = {"shapes": Shapes()}
