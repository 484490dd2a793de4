"""A published file that is read by range, every byte of it verified before anyone sees it.

What does not belong to the wanted range is read for its digest's sake, at most a piece at either
end; the last piece is kept, because the next range mostly begins in it.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

from storage.hashing import PIECE
from storage.manifest import FileEntry, read_pieces
from storage.store import Store

# Pieces of one request.
_AT_ONCE = 4


class PiecedFile:
    """A file in pieces, to be opened any number of times."""

    def __init__(self, store: Store, prefix: str, name: str, entry: FileEntry) -> None:
        self.size = entry.size
        self._store, self._prefix, self._name, self._entry = store, prefix, name, entry
        self._kept = (-1, bytearray())

    def open(self) -> BinaryIO:
        """A seekable stream at its start; reading raises DamagedError naming the file."""
        return cast("BinaryIO", io.BufferedReader(_Verified(self)))

    def read_into(self, buffer: memoryview, at: int) -> int:
        """Fill the buffer from byte `at` on as far as one request goes; 0 at the end."""
        end = min(at + len(buffer), self.size)
        if at >= end:
            return 0
        first = at // PIECE
        number, content = self._kept
        if first != number:
            count = min((end - 1) // PIECE + 1 - first, _AT_ONCE)
            content = bytearray(min((first + count) * PIECE, self.size) - first * PIECE)
            read_pieces(
                self._store, self._prefix, self._name, self._entry, first, memoryview(content)
            )
            # A copy, or the whole request's bytes would stay.
            self._kept = (first + count - 1, content[(count - 1) * PIECE :])
        start = at - first * PIECE
        length = min(end - at, len(content) - start)
        buffer[:length] = memoryview(content)[start : start + length]
        return length


class _Verified(io.RawIOBase):
    """One reader of a file in pieces."""

    def __init__(self, file: PiecedFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        got = self._file.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += got
        return got
