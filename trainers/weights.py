"""The tensors of a model's safetensors files, read by range: only what is asked for is in memory.

Files may lie in a folder or in a store; both are seekable streams.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, overload

import torch
from torch import Tensor, nn

from storage.errors import DamagedError
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan, identity_plan
from trainers.students.surgery import Library, cut_blocks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Opened = Callable[[], BinaryIO | FileIO]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What a weight may be, as safetensors names it."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: str
    begin: int
    """Byte of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """Tensors by name, in the order of the files."""

    def __init__(self, files: Mapping[str, Opened]) -> None:
        """`files` opens each file, whose name is for errors. Reads their headers."""
        self._files = files
        self._places: dict[str, _Place] = {}
        for file in files:
            self._places |= self._header(file)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._places)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        return next(iter(self._places.values())).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor on the CPU, or its rows from `start` up to `stop`. DamagedError without it."""
        if name not in self._places:
            raise DamagedError(
                f"{next(iter(self._files), 'no file')}: neither it nor the files beside it hold "
                f"{name}; copy or download the model again"
            )
        place = self._places[name]
        rows, *rest = place.shape or (1,)
        stop = rows if stop is None else stop
        row = torch.Size(rest).numel() * place.dtype.itemsize
        content = torch.empty((stop - start) * row, dtype=torch.uint8)
        buffer = memoryview(content.numpy().data)
        with self._files[place.file]() as stream:
            stream.seek(place.begin + start * row)
            done = 0
            while done < len(buffer):
                got = stream.readinto(buffer[done:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
                if not got:
                    raise DamagedError(f"{place.file}: cut short; copy or download it again")
                done += got
        shape = (stop - start, *rest) if place.shape else ()
        return content.view(place.dtype).view(shape)

    def _header(self, file: str) -> dict[str, _Place]:
        with self._files[file]() as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise DamagedError(
                    f"{file}: {name} is of dtype {entry['dtype']}; give a model in one of "
                    f"{', '.join(DTYPES)}"
                )
            places[name] = _Place(
                file,
                8 + length + entry["data_offsets"][0],
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )
        return places


@dataclass(frozen=True)
class StreamedBlocks(Sequence[nn.Module]):
    """A teacher's blocks, each read from its files anew whenever it is asked for."""

    family: Family
    config: Config
    """The teacher's."""
    weights: Weights

    def __len__(self) -> int:
        return self.family.blocks(self.config)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        plan = identity_plan(self.family.name, len(self))
        prefix = self.family.block_prefixes(self.config, plan)[index]
        block = self.family.build_block(self.config, BlockPlan(span=(index, index)), "meta")
        tensors = {name: self.weights.read(f"{prefix}{name}") for name in block.state_dict()}
        block.load_state_dict(tensors, assign=True)
        return block


@torch.no_grad()
def fill(module: nn.Module, weights: Weights) -> None:
    """Reads every parameter of a model, sharded or not, of a sharded one only this rank's rows."""
    for name, parameter in module.named_parameters():
        local, start = local_rows(parameter)
        if local.numel():
            rows = (start, start + len(local)) if local.dim() else ()
            local.copy_(weights.read(name, *rows))


@torch.no_grad()
def fill_student(
    student: nn.Module, plan: Plan, blocks: StreamedBlocks, library: Library | None = None
) -> None:
    """Cuts a student, sharded or not, out of its teacher's files, block by block; see `assemble`.

    A rank reads all of one span's blocks at a time and keeps its rows of what they become.
    """
    family, config, weights = blocks.family, blocks.config, blocks.weights
    inside = family.block_prefixes(config, identity_plan(plan.family, plan.teacher_blocks))
    outside = {n: weights.read(n) for n in weights.names if not n.startswith(inside)}
    parameters = dict(student.named_parameters())
    like = torch.empty(0, dtype=weights.dtype)
    cut = cut_blocks(family, config, blocks, plan, like, library)
    for made in chain([outside], cut):
        for name, tensor in made.items():
            put(parameters[name], tensor)


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copies a tensor that is whole here into a parameter, of a sharded one this rank's rows."""
    local, start = local_rows(parameter)
    local.copy_(whole[start : start + len(local)] if local.dim() else whole)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and the number of its first row."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter, 0
    return parameter.to_local(), _offset(parameter)


def _offset(parameter: DTensor) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offsets[0]
