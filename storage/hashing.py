"""Digests of content as it passes: of the whole, or of pieces that can be verified apart."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO, TypeAlias

from xxhash import xxh3_128

PIECE = 4 * 2**20
"""Bytes that are verified together in a file that is read by range."""


class PieceHasher:
    """Digests of the pieces of a content."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._current, self._room = xxh3_128(), PIECE

    def update(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            part, view = view[: self._room], view[self._room :]
            self._current.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._done.append(self._current.hexdigest())
                self._current, self._room = xxh3_128(), PIECE

    def pieces(self) -> tuple[str, ...]:
        return (*self._done, *([self._current.hexdigest()] if self._room < PIECE else []))


Hasher: TypeAlias = "hashlib._Hash | PieceHasher"
"""Takes content bit by bit."""


class Hashed(io.RawIOBase):
    """A stream that is hashed as it passes."""

    def __init__(self, stream: BinaryIO, *hashers: Hasher) -> None:
        self._stream, self._hashers = stream, hashers
        self.size = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        for hasher in self._hashers:
            hasher.update(content)
        self.size += len(content)
        return content
