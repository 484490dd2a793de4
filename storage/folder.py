"""A store in a local or network folder: one file a key, renamed into place when whole."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from storage.errors import MissingKey, StoreError
from storage.store import Stored, Unfinished, check_key

if TYPE_CHECKING:
    from storage.store import Store

PARTIAL = ".partial"
"""Bodies on their way in; on the root's own file system, so that a rename is enough."""
# What a killed writer left there is removed by a later opening; no write takes this long.
_ABANDONED_SECONDS = 24 * 3600


def open_folder(path: str) -> FolderStore:
    """Open the folder; it is made by the first write.

    Raises `StoreError` when it is a file, or neither it nor its first existing parent can be
    written.
    """
    root = Path(path).expanduser().absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not existing.is_dir():
        raise StoreError(f"{root}: {existing} is a file; give a folder to store in")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(f"{root}: {existing} cannot be read and written by this user")
    store = FolderStore(root)
    for write in store.unfinished(""):
        if write.seconds > _ABANDONED_SECONDS:
            store.discard(write)
    return store


class FolderStore:
    """Keys are paths below the root; `.partial/` at its top holds unfinished writes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return str(self._root)

    def read(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise MissingKey(f"{self.url}/{key}: nothing is stored there") from None
        except OSError as error:
            raise self._refused(key, error) from error

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        with self.read(key) as stream:
            stream.seek(start)
            # Buffered, so that it reads until the buffer is full or the body ends.
            return cast("io.BufferedReader", stream).readinto(buffer)

    def write(self, key: str, body: BinaryIO | bytes) -> None:
        target = self._path(key)
        partial = self._root / PARTIAL / uuid.uuid4().hex
        source = io.BytesIO(body) if isinstance(body, bytes) else body
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
                stream.flush()
                # A manifest must not outlive a power cut that its files do not.
                os.fsync(stream.fileno())
            _move(partial, target)
        except OSError as error:
            raise self._refused(key, error) from error
        finally:
            partial.unlink(missing_ok=True)

    def keys(self, prefix: str) -> Iterator[str]:
        return iter(sorted(path.relative_to(self._root).as_posix() for path in self._walk(prefix)))

    def remove(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except (NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            raise self._refused(key, error) from error
        for folder in path.parents:
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # it holds something else, or another remover was first

    def listing(self, prefix: str) -> Iterator[Stored]:
        if not self._root.is_dir():
            return iter(())
        now, found = self._now(), []
        for path in self._walk(prefix):
            with suppress(FileNotFoundError):  # removed meanwhile
                stat = path.stat()
                key = path.relative_to(self._root).as_posix()
                found.append(Stored(key, stat.st_size, now - stat.st_mtime))
        return iter(sorted(found))

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        folder = self._root / PARTIAL
        if prefix or not folder.is_dir():
            return  # which key a file is for is known to its writer alone
        now = self._now()
        for path in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):  # it ended meanwhile
                yield Unfinished(f"{PARTIAL}/{path.name}", path.name, now - path.stat().st_mtime)

    def discard(self, write: Unfinished) -> None:
        (self._root / PARTIAL / write.id).unlink(missing_ok=True)

    def _walk(self, prefix: str) -> Iterator[Path]:
        start = self._path(prefix) if prefix else self._root
        for folder, folders, names in os.walk(start):
            if Path(folder) == self._root and PARTIAL in folders:
                folders.remove(PARTIAL)
            yield from (Path(folder) / name for name in names)

    def _now(self) -> float:
        """The time by the clock that stamps files here, which may be a file server's."""
        with tempfile.TemporaryFile(dir=self._root) as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _path(self, key: str) -> Path:
        if check_key(key).split("/")[0] == PARTIAL:
            raise StoreError(f"{key!r}: {PARTIAL} is where unfinished writes are kept")
        return self._root / key

    def _refused(self, key: str, error: OSError) -> StoreError:
        return StoreError(
            f"{self.url}/{key}: {error.strerror or error}; check the folder's rights and free space"
        )


def _move(partial: Path, target: Path) -> None:
    """Rename into place, making the folders; again if a remover takes an empty one meanwhile."""
    for _ in range(10):
        with suppress(FileNotFoundError, FileExistsError):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)


if TYPE_CHECKING:
    _: type[Store] = FolderStore
