"""Checkpoints of replacements in training: each replacement's under its own prefix.

So any worker continues any replacement, whatever it was trained beside. Pictures, times and noise
of a step follow from the seed and the step (trainers/data/latents), and nothing else is drawn: the
weights, the optimizer's moments and the step are all that an exact continuation needs.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from storage import layout
from storage.checkpoint import Checkpoint, Saver, latest_checkpoint, withdraw_from
from storage.errors import EspalierError
from storage.shards import dtypes
from storage.store import Store
from trainers.optimizer import moments, set_moments
from trainers.students.plan import BlockPlan

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor, nn

_WEIGHT = "weight/"
_OPTIMIZER = "optimizer/"
_KEEP = 2


@dataclass
class History:
    """What a replacement's training has come to."""

    losses: list[float]
    """One a step, NaN of one that was not taken: as many as there were steps."""
    seconds: float = 0.0
    """Its share of the training time so far."""
    continued: tuple[int, ...] = ()
    """Steps from which it went on after it was cut off."""
    setbacks: int = 0
    """How often its rate was halved."""


class LeavingError(Exception):
    """A worker was told that its machine goes; its replacements are saved as they were."""


class Checkpoints:
    """Saves the replacements of a group while they are trained, one after the other in the
    background, and finds what an earlier worker has saved."""

    def __init__(
        self,
        store: Store,
        prefixes: Mapping[BlockPlan, str],
        sweep: str,
        every: int,
        going: threading.Event | None = None,
    ) -> None:
        """`prefixes`: where each replacement will be stored. `sweep`: the name of the one that they
        are trained for. `every`: steps between checkpoints. `going` is set when the machine will be
        taken away."""
        self._store, self._every = store, every
        self._going = going or threading.Event()
        self._prefixes = {b: layout.library_checkpoints(p, sweep) for b, p in prefixes.items()}
        self._savers: dict[BlockPlan, Saver] = {}
        self._turn = threading.Lock()
        self._gone_back: dict[BlockPlan, int] = {}
        """Steps that replacements went back to, of those that have not saved since."""

    def save(
        self,
        block: BlockPlan,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        history: History,
        steps: int,
    ) -> None:
        """Called after every step; begins to save when it is due, never after the last of `steps`.

        Returns when training may go on. Raises what the save before of the same replacement ended
        with."""
        done = len(history.losses)
        if done == steps or (done % self._every and not self._going.is_set()):
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            tensors[f"{_WEIGHT}{name}"] = parameter.detach()
            for kind, value in moments(optimizer, parameter).items():
                tensors[f"{_OPTIMIZER}{kind}/{name}"] = value
        state: dict[str, Any] = {
            # JSON has no NaN.
            "losses": [loss if math.isfinite(loss) else None for loss in history.losses],
            "seconds": history.seconds,
            "continued": history.continued,
            "setbacks": history.setbacks,
        }
        self._gone_back.pop(block, None)
        self._saver(block).save(done, tensors, cast("JsonValue", state))

    def leave(self, done: int, steps: int) -> None:
        """Called when all that trains has been saved after `done` of `steps`. Raises LeavingError
        when the machine goes, as soon as the saves are through."""
        if self._going.is_set() and done < steps:
            for saver in self._savers.values():
                saver.finish()
            raise LeavingError

    def restore(
        self, block: BlockPlan, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> History:
        """Puts the newest checkpoint that is whole into the replacement, and its moments into the
        optimizer, which has not stepped yet; both stay as they are when there is none."""
        history = self._read(block, module, optimizer)
        if history is None:
            return History([])
        self._saver(block)  # which clears away what the save that was cut off has left
        return replace(history, continued=(*history.continued, len(history.losses)))

    def go_back(
        self, block: BlockPlan, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> History | None:
        """Puts the newest checkpoint into the replacement and the optimizer; None when there is
        none, and both stay as they are.

        Gone back to once, without another since, it may itself hold what training diverges from:
        then it goes, and the one before is used.
        """
        if (saver := self._savers.get(block)) is not None:
            saver.finish()
        if (step := self._gone_back.get(block)) is not None:
            withdraw_from(self._store, self._prefixes[block], step)
        history = self._read(block, module, optimizer)
        if history is not None:
            self._gone_back[block] = len(history.losses)
        return history

    def _read(
        self, block: BlockPlan, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> History | None:
        parameters = dict(module.named_parameters())
        read: dict[str, Tensor] = {}

        def load(checkpoint: Checkpoint) -> None:
            # Beside the live ones: a file that turns out damaged must not leave half of itself.
            like = {f"{_WEIGHT}{name}": p.detach() for name, p in parameters.items()}
            into = {name: torch.empty_like(tensor) for name, tensor in like.items()}
            for name, entry in checkpoint.tensors.index.items():
                if name.startswith(_OPTIMIZER):
                    device = parameters[_parameter(name)].device
                    dtype = dtypes()[entry.dtype]
                    into[name] = torch.empty(entry.shape, dtype=dtype, device=device)
            checkpoint.tensors.fill(into)
            read.clear()
            read.update(into)

        checkpoint = latest_checkpoint(self._store, self._prefixes[block], load)
        if checkpoint is None:
            return None
        held: dict[nn.Parameter, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(read[f"{_WEIGHT}{name}"])
        for name, value in read.items():
            if name.startswith(_OPTIMIZER):
                kind = name.split("/")[1]
                held.setdefault(parameters[_parameter(name)], {})[kind] = value
        set_moments(optimizer, held)
        state = cast("dict[str, Any]", checkpoint.state)
        losses = [math.nan if loss is None else loss for loss in state["losses"]]
        # Checkpoints of the first version do not count them: there was no other reason.
        setbacks = state.get("setbacks", state["losses"].count(None))
        return History(losses, state["seconds"], tuple(state["continued"]), setbacks)

    def _saver(self, block: BlockPlan) -> Saver:
        if block not in self._savers:
            self._savers[block] = Saver(
                self._store,
                self._prefixes[block],
                token=secrets.token_hex(8),
                keep=_KEEP,
                turn=self._turn,
            )
        return self._savers[block]

    def settle(self) -> None:
        """Wait for what is under way. What went wrong with it is dropped: nobody waits for it."""
        for saver in self._savers.values():
            with suppress(EspalierError):
                saver.finish()


def _parameter(name: str) -> str:
    """The parameter's name in that of a moment."""
    return name.split("/", 2)[2]
