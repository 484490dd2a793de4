"""Keeps a training that is not done, so that a call of its script goes on where the last was cut
off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

EVERY = 100
"""Steps between two states of a training."""


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


class Unfinished:
    """What a training has come to: its modules, its optimizers, and the generator of its draws."""

    def __init__(
        self, folder: Path, parts: Sequence[Stateful], generator: torch.Generator, steps: int
    ) -> None:
        """`folder` is where the model shall be saved after so many steps in all."""
        self.file, self.parts, self.generator, self.steps = _file(folder), parts, generator, steps

    def resume(self) -> int:
        """Takes the parts and the generator to where they were; the step to do next."""
        # Tensors and plain containers only: no object of a file's own choice is made.
        kept = torch.load(self.file, weights_only=True) if self.file.exists() else None
        if kept is None or kept["steps"] != self.steps:  # of another length, by other rates
            return 0
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
            "steps": self.steps,
            "parts": [part.state_dict() for part in self.parts],
            "generator": self.generator.get_state(),
        }
        written = self.file.with_suffix(".new")
        torch.save(kept, written)
        written.replace(self.file)


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves what a training has come to in the end; it will not go on."""
    pipeline.save_pretrained(folder)
    _file(folder).unlink(missing_ok=True)


def _file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.pt")
