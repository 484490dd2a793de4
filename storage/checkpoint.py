"""Checkpoints of a training run: one published prefix a step, the newest whole one wins."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pydantic import JsonValue

from storage.errors import DamagedError
from storage.manifest import MANIFEST, Body, publish, published, read_bytes, read_json, withdraw
from storage.store import Store
from storage.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_STATE = "state.json"
# A file is serialised whole before it is sent, so this bounds the memory that saving takes.
_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """All that an exact continuation needs."""

    step: int
    tensors: dict[str, Tensor]
    state: JsonValue


def save_checkpoint(
    store: Store, prefix: str, step: int, tensors: Mapping[str, Tensor], state: JsonValue
) -> None:
    """Publish weights, optimizer and random states (`tensors`) and whatever is JSON (`state`).

    Tensors go out in files of about 512 MiB, so that the whole is never copied in memory. A
    state with NaN is refused (ValueError) before anything is written.
    """
    files: dict[str, Body] = {_STATE: json.dumps(state, allow_nan=False).encode()}
    for i, names in enumerate(_grouped(tensors)):
        group = {name: tensors[name] for name in names}
        files[f"tensors-{i:05d}.safetensors"] = partial(save_tensors, group)
    publish(store, _at(prefix, step), files)


def latest_checkpoint(store: Store, prefix: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; a damaged one is passed over with a warning."""
    for step in reversed(_steps(store, prefix)):
        try:
            return _load(store, prefix, step)
        except DamagedError as error:
            _log.warning("%s; using the checkpoint before it", error)
    return None


def keep_last(store: Store, prefix: str, count: int) -> None:
    """Withdraw all but the newest `count` (at least 1), and older remains of unfinished saves."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    kept = _steps(store, prefix)[-count:]
    folders = {key[len(prefix) + 1 :].split("/")[0] for key in store.keys(prefix)}
    for folder in sorted(folders):
        step = _step(folder)
        if step is not None and kept and step < kept[0]:
            withdraw(store, f"{prefix}/{folder}")


def _load(store: Store, prefix: str, step: int) -> Checkpoint:
    at = _at(prefix, step)
    manifest = published(store, at)
    if manifest is None:
        raise DamagedError(f"{store.url}/{at}: withdrawn while it was being read")
    tensors: dict[str, Tensor] = {}
    for name in manifest.files:
        if name != _STATE:
            content = read_bytes(store, at, name, manifest)
            tensors |= load_tensors(content, f"{store.url}/{at}/{name}")
    return Checkpoint(step, tensors, read_json(store, at, _STATE, manifest))


def _steps(store: Store, prefix: str) -> list[int]:
    """Steps with a manifest, oldest first."""
    found = []
    for key in store.keys(prefix):
        folder, _, name = key[len(prefix) + 1 :].partition("/")
        step = _step(folder)
        if step is not None and name == MANIFEST:
            found.append(step)
    return sorted(found)


def _grouped(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not groups or size > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _at(prefix: str, step: int) -> str:
    return f"{prefix}/step-{step:09d}"


def _step(folder: str) -> int | None:
    match = re.fullmatch(r"step-(\d{9,})", folder)
    return int(match[1]) if match else None
