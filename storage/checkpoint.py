"""Checkpoints of a training run: one published prefix a step, the newest whole one wins.

Training stands still only while a rank's shards are staged: in memory when they are few, otherwise
in a nameless file in the folder for temporary files (TMPDIR), which should be a local disk. A
thread sends them from there while training goes on, so memory does not grow with the model. Without
room on that disk the tensors are sent as they are, and training waits.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from pydantic import JsonValue

from storage.errors import DamagedError
from storage.manifest import MANIFEST, published, read_json, withdraw
from storage.shards import TensorEntry, TensorFile, plan_shares, publish_shares, write_share
from storage.store import Store, discard_unfinished
from storage.stored import StoredTensors, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_STATE = "state.json"
# A rank's shards up to this size are staged in memory; larger ones on disk.
# (A worker trains up to some tens of replacements, which all save at the same step.)
_IN_MEMORY = 16 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """All that an exact continuation needs."""

    step: int
    state: JsonValue
    tensors: StoredTensors


class Saver:
    """Saves one rank's part of a run's checkpoints; every rank of the run has one.

    At most one checkpoint is under way: the next save waits for it, and raises what went wrong
    with it.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        rank: int = 0,
        world: int = 1,
        token: str = "0",
        keep: int = 2,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        """`token`: a word that all ranks of this attempt share and no other attempt has. `keep`:
        how many checkpoints stay. `turn`: a lock that savers of one process share which are to
        send one after another.

        The first rank clears away what attempts that were killed have left.
        """
        self._store, self._prefix = store, prefix
        self._rank, self._world, self._token, self._keep = rank, world, token, keep
        self._turn = turn or nullcontext()
        self._saves = 0
        self._sending: threading.Thread | None = None
        self._failed: BaseException | None = None
        self.blocked = 0.0
        """Seconds that training has stood still for saving."""
        if rank == 0:
            clear_unfinished(store, prefix)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: JsonValue,
        own: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin to publish weights, optimizer and random states, and whatever is JSON.

        Returns when the tensors may change. Every rank calls it at the same steps with the same
        names; `own` are tensors that only this rank has. Raises what the save before ended with,
        and ValueError for NaN in the state (the first rank's counts), before anything is written.
        """
        started = time.monotonic()
        content = json.dumps(state, allow_nan=False).encode()
        self._settle()
        file, entries = plan_shares(tensors, self._rank, own)
        self._saves += 1
        token = f"{self._token}-{self._saves}"
        staged = _stage(file)
        arguments = (step, token, staged or cast("BinaryIO", file), entries, content)
        self._sending = threading.Thread(target=self._send, args=arguments, daemon=True)
        self._sending.start()
        if staged is None:
            self._settle()
        self.blocked += time.monotonic() - started

    def finish(self) -> None:
        """Wait for the checkpoint that is under way; raises what went wrong with it."""
        self._settle()

    def _settle(self) -> None:
        if self._sending is not None:
            self._sending.join()
            self._sending = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def _send(
        self,
        step: int,
        token: str,
        stream: BinaryIO,
        entries: Mapping[str, TensorEntry],
        state: bytes,
    ) -> None:
        at = _at(self._prefix, step)
        try:
            with self._turn:
                with stream:
                    write_share(self._store, at, token, self._rank, stream, entries)
                if self._rank == 0:
                    publish_shares(self._store, at, token, self._world, {_STATE: state})
                    keep_last(self._store, self._prefix, self._keep)
        except BaseException as error:
            self._failed = error


def latest_checkpoint(
    store: Store,
    prefix: str,
    load: Callable[[Checkpoint], None],
    agree: Callable[[int], int] = lambda value: value,
    below: int = sys.maxsize,
) -> Checkpoint | None:
    """Load the newest checkpoint of a step `below` that is whole, and return it; None when there is
    none.

    `load` reads from it what this rank needs; one that turns out damaged at any rank is passed over
    with a warning. `agree` is the least of all ranks' values, when there are several; all call it
    equally often. No rank may have a save under way when it calls this.
    """
    # The first rank publishes for all: until it is here, the others would not see its newest
    # checkpoint yet, but still the one that goes for it.
    agree(0)
    while True:
        step = agree(max((s for s in _steps(store, prefix) if s < below), default=-1))
        if step < 0:
            return None
        found = None
        try:
            found = _open(store, prefix, step)
            load(found)
            whole = 1
        except DamagedError as error:
            _log.warning("%s; using the checkpoint before it", error)
            whole = 0
        if agree(whole) and found is not None:
            return found
        below = step


def newest_step(store: Store, prefix: str) -> int | None:
    """The step of the newest checkpoint, or None when there is none; whether it is whole shows when
    it is loaded."""
    return max(_steps(store, prefix), default=None)


def keep_last(store: Store, prefix: str, count: int) -> None:
    """Withdraw all but the newest `count` (at least 1), and older remains of unfinished saves."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    kept = _steps(store, prefix)[-count:]
    for step in _folders(store, prefix):
        if kept and step < kept[0]:
            withdraw(store, _at(prefix, step))


def withdraw_from(store: Store, prefix: str, step: int) -> None:
    """Withdraw the checkpoints of this step and of later ones; no save may be under way."""
    for found in _folders(store, prefix):
        if found >= step:
            withdraw(store, _at(prefix, found))


def clear_unfinished(store: Store, prefix: str) -> None:
    """Remove what saves that were cut off have left; no save may be under way."""
    discard_unfinished(store, prefix)
    for step in _folders(store, prefix) - set(_steps(store, prefix)):
        withdraw(store, _at(prefix, step))


def _stage(file: TensorFile) -> BinaryIO | None:
    """A copy of the file, or None when there is no room for it."""
    stream: BinaryIO | None = None
    try:
        stream = io.BytesIO() if file.size <= _IN_MEMORY else _nameless_file()
        for bit in file.bits():
            stream.write(bit)
        stream.seek(0)
    except OSError as error:
        if stream is not None:
            stream.close()
        _log.warning(
            "%s: no room to stage a checkpoint of %d bytes (%s); training waits until it is sent, "
            "free some space or set TMPDIR to another disk",
            tempfile.tempdir or "no folder for temporary files",
            file.size,
            error.strerror,
        )
        return None
    return stream


def _nameless_file() -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile())


def _open(store: Store, prefix: str, step: int) -> Checkpoint:
    at = _at(prefix, step)
    manifest = published(store, at)
    if manifest is None:
        raise DamagedError(f"{store.url}/{at}: withdrawn while it was being read")
    tensors = open_tensors(store, at, manifest)
    return Checkpoint(step, read_json(store, at, _STATE, manifest), tensors)


def _steps(store: Store, prefix: str) -> list[int]:
    """Steps with a manifest, oldest first."""
    found = []
    for key in store.keys(prefix):
        folder, _, name = key[len(prefix) + 1 :].partition("/")
        step = _step(folder)
        if step is not None and name == MANIFEST:
            found.append(step)
    return sorted(found)


def _folders(store: Store, prefix: str) -> set[int]:
    """Steps of which anything is stored."""
    folders = {key[len(prefix) + 1 :].split("/")[0] for key in store.keys(prefix)}
    return {step for folder in folders if (step := _step(folder)) is not None}


def _at(prefix: str, step: int) -> str:
    return f"{prefix}/step-{step:09d}"


def _step(folder: str) -> int | None:
    match = re.fullmatch(r"step-(\d{9,})", folder)
    return int(match[1]) if match else None
