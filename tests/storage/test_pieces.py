"""A published file that is read by range: the right bytes, few requests, and no damaged one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from storage.errors import DamagedError
from storage.hashing import PIECE
from storage.manifest import publish
from storage.pieces import PiecedFile
from storage.store import Store, open_store

CONTENT = os.urandom(5 * PIECE + 1000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def file(store: Store) -> PiecedFile:
    manifest = publish(store, "p", {"big": lambda: io.BytesIO(CONTENT)})
    return PiecedFile(store, "p", "big", manifest.files["big"])


@pytest.mark.parametrize(
    ("at", "length"),
    [(0, 8), (PIECE - 3, 6), (1, 5 * PIECE), (5 * PIECE - 1, 1001), (3, 0), (len(CONTENT), 5)],
)
def test_any_range_is_what_was_published(file: PiecedFile, at: int, length: int) -> None:
    with file.open() as stream:
        stream.seek(at)
        assert stream.read(length) == CONTENT[at : at + length]


def test_ranges_in_one_piece_cost_one_request(
    file: PiecedFile, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    read_into = store.read_into

    def count(key: str, start: int, buffer: memoryview) -> int:
        asked.append((start, start + len(buffer)))
        return read_into(key, start, buffer)

    monkeypatch.setattr(store, "read_into", count)
    for at in range(0, PIECE, PIECE // 8):
        with file.open() as stream:
            stream.seek(at)
            stream.read(10)
    assert asked == [(0, PIECE)]


def test_damage_is_named_where_it_is_read_and_nowhere_else(file: PiecedFile, store: Store) -> None:
    damaged = bytearray(CONTENT)
    damaged[2 * PIECE + 7] ^= 1
    store.write("p/big", bytes(damaged))
    with file.open() as stream:
        assert stream.read(2 * PIECE - 10) == CONTENT[: 2 * PIECE - 10]
    with file.open() as stream:
        stream.seek(2 * PIECE)
        with pytest.raises(DamagedError, match="p/big: its bytes from"):
            stream.read(1)


def test_a_file_that_was_cut_short_is_named(file: PiecedFile, store: Store) -> None:
    store.write("p/big", CONTENT[: 5 * PIECE + 10])
    with file.open() as stream:
        stream.seek(5 * PIECE)
        with pytest.raises(DamagedError, match="p/big: ends at"):
            stream.read(10)
