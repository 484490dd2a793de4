"""Copies of published files on this machine, shared by all its processes.

They lie under $XDG_CACHE_HOME/espalier (~/.cache/espalier), may be deleted at any time, and are
verified against their manifest once, and again whenever a file's size or time of change differs: to
read an encoding of terabytes anew for every process would take longer than to train on it.
Processes that need the same files at once fetch them once. Where a disk has no room for more, what
was not asked for in a week gives way, the longest unused first.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import JsonValue

from storage.digest import digest_json
from storage.errors import EspalierError, MissingKey
from storage.manifest import Manifest, fetch, hidden, is_copy, published
from storage.store import Store
from storage.urls import folder_name

IDLE = 7 * 24 * 3600.0
"""Seconds that a copy must not have been asked for before it may give way to another: whoever asked
for it may still read it."""

_VERIFIED = ".verified"


class CacheError(EspalierError):
    """The folder for copies cannot take what shall be copied."""


def local_copy(
    store: Store, prefix: str, manifest: Manifest | None = None, cache: Path | None = None
) -> Path:
    """The folder that holds the files published under `prefix`, whole.

    `cache` takes the place of the user's cache folder. `MissingKey` when nothing is published,
    `DamagedError` naming a file that differs from what was, `CacheError` when the disk is full or
    cannot be written.
    """
    if cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "espalier" / "copies"
    manifest = manifest or published(store, prefix)
    if manifest is None:
        raise MissingKey(f"{store.url}/{prefix}: nothing is published there")
    folder = cache / folder_name(store.url) / prefix
    try:
        while not _known(folder, manifest):
            if is_copy(folder, manifest):
                _remember(folder, manifest)
                break
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(f".{folder.name}.lock"))
            try:
                with lock.acquire(timeout=0):
                    _make_room(folder, manifest, cache)
                    fetch(store, prefix, folder, manifest)
                    _remember(folder, manifest)
                    break
            except Timeout:
                with lock:
                    pass  # another process was at it; look what has come of it
    except OSError as error:
        raise CacheError(
            f"{folder}: {store.url}/{prefix} cannot be copied there ({error.strerror or error}); "
            "make room, or set XDG_CACHE_HOME to a folder on another disk"
        ) from error
    with suppress(OSError):  # what tells who has to give way
        os.utime(_note(folder))
    return folder


def _known(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder is as it was when it was last verified."""
    try:
        return _note(folder).read_text() == _state(folder, manifest)
    except OSError:
        return False


def _remember(folder: Path, manifest: Manifest) -> None:
    note = _note(folder)
    partial = note.with_name(f"{note.name}.{os.getpid()}")
    with suppress(OSError):  # a cache that cannot be written only costs time
        partial.write_text(_state(folder, manifest))
        partial.replace(note)


def _note(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_VERIFIED}")


def _state(folder: Path, manifest: Manifest) -> str:
    """Digest of what the files should be, and of what tells without reading that they changed."""
    found: list[JsonValue] = []
    for name, entry in sorted(manifest.files.items()):
        stat = (folder / name).stat()
        found.append([name, entry.model_dump(mode="json"), stat.st_size, stat.st_mtime_ns])
    return digest_json(found)


def _make_room(folder: Path, manifest: Manifest, cache: Path) -> None:
    """Remove what killed processes have left, and what nobody needs where there is no room; OSError
    without room for what is missing."""
    for file in (folder / name for name in manifest.files):
        for left in file.parent.glob(f"{escape(hidden(file.name))}*"):
            left.unlink()
    missing = sum(e.size for name, e in manifest.files.items() if not (folder / name).is_file())
    if missing > shutil.disk_usage(folder).free:
        for idle in _idle(cache):
            _discard(idle)
            if missing <= shutil.disk_usage(folder).free:
                break
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(f"{missing / 2**30:.1f} GiB are missing, {free / 2**30:.1f} GiB are free")


def _idle(cache: Path) -> list[Path]:
    """The copies that may give way, the longest unused first."""
    notes = [(note.stat().st_mtime, note) for note in cache.rglob(f".*{_VERIFIED}")]
    names = ((note, note.name[1:].removesuffix(_VERIFIED)) for used, note in sorted(notes)
             if time.time() - used > IDLE)  # fmt: skip
    return [note.with_name(name) for note, name in names]


def _discard(copy: Path) -> None:
    """Remove a copy unless somebody is at it."""
    lock = FileLock(copy.with_name(f".{copy.name}.lock"))
    with suppress(Timeout), lock.acquire(timeout=0):
        _note(copy).unlink(missing_ok=True)
        shutil.rmtree(copy, ignore_errors=True)
