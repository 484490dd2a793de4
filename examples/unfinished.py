"""Keeps a training that is not done, so that a call of its script goes on where the last was cut
off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

EVERY = 100
"""Steps between two states of a training."""


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


class Unfinished:
    """What a training has come to: its modules, its optimizers, and the generator of its draws."""

    def __init__(self, file: Path, parts: Sequence[Stateful], generator: torch.Generator) -> None:
        self.file, self.parts, self.generator = file, parts, generator

    def resume(self) -> int:
        """Takes the parts and the generator to where they were; the step to do next."""
        if not self.file.exists():
            return 0
        kept = torch.load(self.file, weights_only=True)
        for part, state in zip(self.parts, kept["parts"], strict=True):
            part.load_state_dict(state)
        self.generator.set_state(kept["generator"])
        print(f"goes on at step {kept['step']}", flush=True)
        return int(kept["step"])

    def keep(self, done: int) -> None:
        """Call it after every step, with the number of steps done."""
        if done % EVERY:
            return
        kept = {
            "step": done,
            "parts": [part.state_dict() for part in self.parts],
            "generator": self.generator.get_state(),
        }
        written = self.file.with_suffix(".new")
        torch.save(kept, written)
        written.replace(self.file)
