"""Reads tensors that several ranks have written together; every rank only what it holds of them.

Files are read by range, several ranges at once, each verified; what is in memory at a time does not
grow with the tensors.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from storage.errors import DamagedError, MissingKey
from storage.hashing import PIECE
from storage.manifest import Manifest, published, read_bytes, read_pieces
from storage.shards import INDEX, Chunk, Index, TensorEntry, dtypes, part_of
from storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor

# Requests under way at once, and the pieces of each.
_PARALLEL = 6
_PIECES = 4


class _Run(NamedTuple):
    """Bytes that lie together, in a file and in a tensor."""

    begin: int
    """In the file."""
    length: int
    at: int
    """In the bytes of the tensor's local part."""
    into: Tensor


class _Window(NamedTuple):
    """Neighbouring pieces of a file, and the runs that reach into them."""

    file: str
    first: int
    pieces: int
    runs: Sequence[_Run]


class StoredTensors:
    """The tensors under a published prefix."""

    def __init__(
        self, store: Store, prefix: str, manifest: Manifest, index: dict[str, TensorEntry]
    ) -> None:
        self.index = index
        """By name."""
        self._store, self._prefix, self._manifest = store, prefix, manifest

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Read the named tensors in place, of sharded ones the part that is here.

        A tensor of another dtype than the stored one is cast. Raises `DamagedError`, naming the
        file, after which their content is undefined; also for a name that is not stored, and for
        another shape.
        """
        runs: dict[str, list[_Run]] = {}
        casts: list[tuple[Tensor, Tensor]] = []
        for name, tensor in into.items():
            entry = self._entry(name, tuple(tensor.shape))
            part = part_of(tensor)
            if not part.local.numel():
                continue
            work, stored = part.local.detach(), dtypes()[entry.dtype]
            if work.dtype != stored or not work.is_contiguous():
                casts.append((work, work.new_empty(work.shape, dtype=stored)))
                work = casts[-1][1]
            held = 0
            for chunk in entry.chunks:
                for run in _runs(chunk, part.offsets, work):
                    runs.setdefault(chunk.file, []).append(run)
                    held += run.length
            if held != work.numel() * work.element_size():
                raise self._damaged(f"its shards do not make up {name}")
        with ThreadPoolExecutor(_PARALLEL) as pool:
            windows = [w for file, many in runs.items() for w in _windows(file, many)]
            try:
                for _ in pool.map(self._read, windows):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
        for target, work in casts:
            target.copy_(work)

    def like(self) -> dict[str, Tensor]:
        """What each tensor is like, on the meta device."""
        import torch

        known = dtypes()
        return {
            name: torch.empty(entry.shape, dtype=known[entry.dtype], device="meta")
            for name, entry in self.index.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        import torch

        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=dtypes()[entry.dtype])
        self.fill({name: tensor})
        return tensor

    def _entry(self, name: str, shape: tuple[int, ...] | None = None) -> TensorEntry:
        entry = self.index.get(name)
        if entry is None:
            raise self._damaged(f"holds no {name}")
        if shape is not None and shape != entry.shape:
            raise self._damaged(f"{name} is {list(entry.shape)} there and {list(shape)} here")
        return entry

    def _read(self, window: _Window) -> None:
        entry = self._manifest.files.get(window.file)
        if entry is None or not entry.xxh3:
            raise self._damaged(f"{window.file} is not among its files")
        count = min(window.pieces, len(entry.xxh3) - window.first)
        if count <= 0:
            raise self._damaged(f"{window.file} is shorter than its index says")
        start = window.first * PIECE
        end = min(start + count * PIECE, entry.size)
        whole = _in_place(window.runs, start, end)
        content = memoryview(bytearray(end - start)) if whole is None else whole
        read_pieces(self._store, self._prefix, window.file, entry, window.first, content)
        if whole is not None:
            return
        for run in window.runs:
            low = max(run.begin, start)
            high = min(run.begin + run.length, start + len(content))
            _put(content, low - start, high - low, run.into, run.at + low - run.begin)

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self._store.url}/{self._prefix}: {what}; it is of another model, or remove it and "
            "write it again"
        )


def open_tensors(store: Store, prefix: str, manifest: Manifest | None = None) -> StoredTensors:
    """What `publish_shares` published there. Raises `MissingKey` or `DamagedError`."""
    manifest = manifest or published(store, prefix)
    if manifest is None:
        raise MissingKey(f"{store.url}/{prefix}: nothing is published there")
    content = read_bytes(store, prefix, INDEX, manifest)
    try:
        index = Index.validate_json(content)
    except ValidationError as error:
        raise DamagedError(
            f"{store.url}/{prefix}/{INDEX}: not an index of tensors ({error.errors()[0]['msg']})"
        ) from None
    return StoredTensors(store, prefix, manifest, index)


def _runs(chunk: Chunk, offsets: tuple[int, ...], work: Tensor) -> Iterator[_Run]:
    """What of a stored box belongs into a local one, in as few runs as there are."""
    import torch

    size = work.element_size()
    low = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
    high = [
        min(a + n, b + m)
        for a, n, b, m in zip(chunk.offsets, chunk.shape, offsets, work.shape, strict=True)
    ]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return
    shared = [b - a for a, b in zip(low, high, strict=True)]
    # From dimension `split` on, what is shared lies together in both boxes.
    split = len(shared)
    while split and chunk.shape[split - 1] == work.shape[split - 1] == shared[split - 1]:
        split -= 1
    split = max(0, split - 1)
    length = math.prod(shared[split:]) * size
    into = work.reshape(-1).view(torch.uint8)
    rows = (range(a, b) for a, b in zip(low[:split], high[:split], strict=True))
    for row in itertools.product(*rows):
        place = [*row, *low[split:]]
        begin = chunk.begin + size * _flat(place, chunk.offsets, chunk.shape)
        yield _Run(begin, length, size * _flat(place, offsets, tuple(work.shape)), into)


def _flat(place: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> int:
    """Number of an element of a box, row by row."""
    number = 0
    for at, offset, size in zip(place, offsets, shape, strict=True):
        number = number * size + at - offset
    return number


def _windows(file: str, runs: list[_Run]) -> Iterator[_Window]:
    """The pieces that the runs need, each once, neighbours together."""
    runs.sort(key=lambda run: run.begin)
    needed = sorted(
        {
            number
            for run in runs
            for number in range(run.begin // PIECE, (run.begin + run.length - 1) // PIECE + 1)
        }
    )
    groups: list[list[int]] = []
    for number in needed:
        if groups and number == groups[-1][-1] + 1 and len(groups[-1]) < _PIECES:
            groups[-1].append(number)
        else:
            groups.append([number])
    begins, ends = [run.begin for run in runs], [run.begin + run.length for run in runs]
    for group in groups:
        start = bisect_right(ends, group[0] * PIECE)
        end = bisect_left(begins, (group[-1] + 1) * PIECE)
        yield _Window(file, group[0], len(group), runs[start:end])


def _in_place(runs: Sequence[_Run], start: int, end: int) -> memoryview | None:
    """Where the bytes of a file from `start` to `end` lie in a tensor's memory, if they all do."""
    if len(runs) != 1:
        return None
    (run,) = runs
    if run.into.device.type != "cpu" or run.begin > start or run.begin + run.length < end:
        return None
    at = run.at + start - run.begin
    return memoryview(run.into.numpy().data)[at : at + end - start]


def _put(content: memoryview, start: int, length: int, into: Tensor, at: int) -> None:
    import numpy as np
    import torch

    source = np.frombuffer(content, np.uint8, length, start)
    if into.device.type == "cpu":
        into.numpy()[at : at + length] = source
    else:
        into[at : at + length].copy_(torch.from_numpy(source.copy()))
