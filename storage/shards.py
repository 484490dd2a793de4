"""Tensors that several ranks write together: each its own shards, as one safetensors file.

    TOKEN-rank-00000.safetensors    the shards of one rank, in pieces: see manifest.FileEntry
    TOKEN-rank-00000.json           what is in it, until all ranks' are there
    index.json                      where every shard of every tensor lies
    manifest.json                   last

Nothing is gathered: a rank copies bits of its tensors to the CPU as they are sent. Another number
of ranks reads it, see storage.stored.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, cast

from pydantic import JsonValue, NonNegativeInt, TypeAdapter

from storage.errors import DamagedError, StoreError
from storage.hashing import Hashed, PieceHasher
from storage.manifest import MANIFEST, FileEntry, Manifest, commit, twice
from storage.section import Section
from storage.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "index.json"

# What is copied to the CPU at a time.
_BIT = 16 * 2**20
# How long the first rank waits for the others' files; they all began at the same step.
_PATIENCE_SECONDS = 3600.0
_LOOK_SECONDS = 0.2


class Chunk(Section):
    """A box of a tensor, row by row in one file."""

    file: str
    begin: NonNegativeInt
    """Byte of the file where it starts."""
    offsets: tuple[NonNegativeInt, ...]
    """Its first element's place in the tensor."""
    shape: tuple[NonNegativeInt, ...]


class TensorEntry(Section):
    """One stored tensor."""

    dtype: str
    """As safetensors names it, such as "BF16"."""
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[Chunk, ...]
    """They cover the tensor, without overlap."""


Index = TypeAdapter(dict[str, TensorEntry])


class Share(Section):
    """What one rank has written."""

    file: str
    entry: FileEntry
    tensors: dict[str, TensorEntry]


@dataclass(frozen=True)
class Part:
    """The box of a tensor that this process holds."""

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: bool
    """Of the processes that hold the same box, this one writes it."""


def part_of(tensor: Tensor, rank: int = 0) -> Part:
    """A tensor that is not distributed is held whole by every rank."""
    from torch.distributed.tensor import DTensor

    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * len(shape), shape, rank == 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{tensor.placements}: a tensor that is still to be summed is no state")
    mesh = tensor.device_mesh
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
    first = all(
        place == 0 or not placement.is_replicate()
        for place, placement in zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    )
    return Part(tensor.to_local(), tuple(offsets), shape, first)


class TensorFile(io.RawIOBase):
    """A safetensors file of live tensors, of which only the bit being read is copied."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        *,
        read: Callable[[str], Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`dtype` is what floating-point tensors are cast to. `read` brings a tensor when its turn
        comes; those in `tensors` then only say what it is like, and may be on the meta device."""
        self._dtype, self._read = dtype, read
        # The widest elements first, so that all of them are aligned.
        names = sorted(tensors, key=lambda name: (-self._stored(tensors[name]).itemsize, name))
        self._tensors = {name: tensors[name] for name in names}
        described: dict[str, JsonValue] = {"__metadata__": dict(metadata)} if metadata else {}
        self.begins: dict[str, int] = {}
        end = 0
        for name, tensor in self._tensors.items():
            stored = self._stored(tensor)
            start, end = end, end + tensor.numel() * stored.itemsize
            described[name] = {
                "dtype": dtype_name(stored),
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self.begins[name] = start
        header = json.dumps(described, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = struct.pack("<Q", len(header)) + header
        self.begins = {name: len(self._header) + begin for name, begin in self.begins.items()}
        self.size = len(self._header) + end
        self._bits = self.bits()
        self._left = memoryview(b"")

    def bits(self) -> Iterator[memoryview]:
        """The content from its start, bit by bit; each is valid until the tensors change."""
        import torch

        yield memoryview(self._header)
        for name, like in self._tensors.items():
            tensor, stored = self._read(name) if self._read else like, self._stored(like)
            flat, step = tensor.detach().reshape(-1), _BIT // stored.itemsize
            for start in range(0, len(flat), step):
                bit = flat[start : start + step].to("cpu", stored)
                yield memoryview(bit.view(torch.uint8).numpy().data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return b"".join(iter(lambda: self.read(_BIT), b""))
        if not self._left:
            self._left = next(self._bits, memoryview(b""))
        bit, self._left = self._left[:size], self._left[size:]
        return bytes(bit)

    def _stored(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype


def plan_shares(
    tensors: Mapping[str, Tensor],
    rank: int = 0,
    own: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[TensorFile, dict[str, TensorEntry]]:
    """This rank's file, and what is in it; the file's name in the entries is left empty.

    Tensors that are not distributed are the first rank's to write, but for `own`, which no other
    rank has under the same names.
    """
    parts = {name: part_of(tensor, rank) for name, tensor in tensors.items()}
    parts |= {name: part_of(tensor) for name, tensor in (own or {}).items()}
    parts = {name: part for name, part in parts.items() if part.first and part.local.numel()}
    file = TensorFile({name: part.local for name, part in parts.items()}, dtype)
    entries = {}
    for name, part in parts.items():
        chunk = Chunk(
            file="",
            begin=file.begins[name],
            offsets=part.offsets,
            shape=tuple(part.local.shape),
        )
        stored = dtype_name(file._stored(part.local))
        entries[name] = TensorEntry(dtype=stored, shape=part.shape, chunks=(chunk,))
    return file, entries


def write_share(
    store: Store,
    prefix: str,
    token: str,
    rank: int,
    stream: BinaryIO,
    tensors: Mapping[str, TensorEntry],
) -> Share:
    """Write this rank's file, then what is in it. `token` is one word of all ranks for this write,
    so that nothing left of an earlier one is taken for a part of it."""
    name = f"{token}-rank-{rank:05d}"
    pieces = PieceHasher()
    hashed = Hashed(stream, pieces)
    store.write(f"{prefix}/{name}.safetensors", cast("BinaryIO", hashed))
    share = Share(
        file=f"{name}.safetensors",
        entry=FileEntry(size=hashed.size, xxh3=pieces.pieces()),
        tensors=dict(tensors),
    )
    content = share.model_dump_json().encode()
    # No manifest vouches for it yet.
    digest = hashlib.sha256(content).hexdigest().encode()
    store.write(f"{prefix}/{name}.json", digest + b"\n" + content)
    return share


def publish_shares(
    store: Store,
    prefix: str,
    token: str,
    world: int,
    files: Mapping[str, bytes],
    meta: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Wait for the shares of all ranks, then publish them with some small files; one rank does it.

    What an earlier write left under the prefix is removed afterwards.
    """
    keys = _await_shares(store, prefix, token, world)
    shares = [twice(partial(_share, store, key)) for key in keys]
    index: dict[str, TensorEntry] = {}
    for share in shares:
        for name, entry in share.tensors.items():
            chunks = tuple(c.model_copy(update={"file": share.file}) for c in entry.chunks)
            if name in index:
                chunks = (*index[name].chunks, *chunks)
            index[name] = entry.model_copy(update={"chunks": chunks})
    small = {**files, INDEX: Index.dump_json(index)}
    entries = {share.file: share.entry for share in shares}
    for name, content in small.items():
        entries[name] = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        store.write(f"{prefix}/{name}", content)
    manifest = commit(store, prefix, entries, meta)
    kept = {MANIFEST, *entries}
    for key in store.keys(prefix):
        if key[len(prefix) + 1 :] not in kept:
            store.remove(key)
    return manifest


def publish_tensors(
    store: Store,
    prefix: str,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    meta: Mapping[str, JsonValue] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    token: str = "0",
    dtype: torch.dtype | None = None,
) -> None:
    """Store tensors that may be sharded over `world` ranks, all of which call this; the first rank
    adds some small files and publishes."""
    file, entries = plan_shares(tensors, rank, dtype=dtype)
    write_share(store, prefix, token, rank, cast("BinaryIO", file), entries)
    if rank == 0:
        publish_shares(store, prefix, token, world, files, meta)


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors writes it; ValueError for one that it does not have."""
    for name, known in dtypes().items():
        if known == dtype:
            return name
    raise ValueError(f"{dtype}: safetensors has no such dtype")


def dtypes() -> dict[str, torch.dtype]:
    """By safetensors' names."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip


def _await_shares(store: Store, prefix: str, token: str, world: int) -> list[str]:
    wanted = [f"{prefix}/{token}-rank-{rank:05d}.json" for rank in range(world)]
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while missing := set(wanted) - set(store.keys(prefix)):
        if time.monotonic() > deadline:
            raise StoreError(
                f"{store.url}/{min(missing)}: not written after {_PATIENCE_SECONDS:.0f} s; see why "
                "that rank did not finish"
            )
        time.sleep(_LOOK_SECONDS)
    return wanted


def _share(store: Store, key: str) -> Share:
    with store.read(key) as stream:
        digest, _, content = stream.read().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DamagedError(f"{store.url}/{key}: not what was written (another digest)")
    return Share.model_validate_json(content)
