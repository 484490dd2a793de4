"""The shapes task: coloured shapes at places, GenEval's six families, an exact judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.tasks.shapes import grammar

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Shapes:
    """The shapes task behind the `Task` protocol."""

    families: tuple[str, ...] = grammar.FAMILIES

    def judge(self, picture: Image, caption: str) -> bool:
        from trainers.tasks.shapes.judge import judge  # scipy: late, the CLI names tasks at start

        return judge(picture, caption)

    def family(self, caption: str) -> str:
        return grammar.parse(caption).family

    def held_out_captions(self, per_family: int, seed: int) -> list[str]:
        return [request.caption for request in grammar.held_out_requests(per_family, seed)]
