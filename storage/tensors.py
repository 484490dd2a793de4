"""Tensors as safetensors, in memory or on disk; a damaged file is named before it is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

# The library's own limit; a larger first number means that this is some other kind of file.
_LONGEST_HEADER = 100_000_000


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file; tensors may be on any device and share memory."""
    import safetensors.torch

    ours: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        ours[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return safetensors.torch.save(ours, dict(metadata) if metadata else None)


def load_tensors(data: bytes | Path, where: str) -> dict[str, Tensor]:
    """Tensors on the CPU. Raises `DamagedError` that names `where`."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        if isinstance(data, Path):
            check_safetensors(data, where)
            return safetensors.torch.load_file(data)
        _check(data[: 8 + _header_length(data[:8], where)], len(data), where)
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise _damaged(where, str(error)) from error


def check_safetensors(path: Path, where: str | None = None) -> None:
    """Check header and length without reading the tensors.

    Raises `DamagedError` when the file is missing, cut short, longer than its header says, or not
    safetensors; `where` names it in place of the path.
    """
    where = where or str(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
            head += stream.read(_header_length(head, where))
            size = path.stat().st_size
    except (FileNotFoundError, IsADirectoryError):
        raise DamagedError(f"{where}: there is no such file; fetch it again") from None
    _check(head, size, where)


def _header_length(head: bytes, where: str) -> int:
    if len(head) < 8:
        raise _damaged(where, f"only {len(head)} bytes")
    length: int = struct.unpack("<Q", head)[0]
    if not 2 <= length <= _LONGEST_HEADER:
        raise _damaged(where, "another kind of file")
    return length


def _check(head: bytes, size: int, where: str) -> None:
    """`head` is the length and the header, as far as the file has them; `size` the whole file's."""
    length = _header_length(head[:8], where)
    if len(head) < 8 + length:
        raise _damaged(where, f"cut short inside its header, at {size} bytes")
    try:
        header = json.loads(head[8:])
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        raise _damaged(where, "another kind of file") from None
    if size != expected:
        raise _damaged(where, f"{size} bytes, but its header speaks of {expected}")


def _damaged(where: str, reason: str) -> DamagedError:
    return DamagedError(
        f"{where}: not a whole safetensors file ({reason}); fetch or write it again"
    )
