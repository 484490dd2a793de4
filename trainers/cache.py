"""Copies of published files on this machine, shared by all its processes.

They lie under $XDG_CACHE_HOME/espalier (~/.cache/espalier), may be deleted at any time, and are
verified against their manifest at every use. Processes that need the same files at once fetch them
once.
"""

from __future__ import annotations

import os
import shutil
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from storage.errors import EspalierError, MissingKey
from storage.manifest import Manifest, fetch, hidden, is_copy, published
from storage.store import Store
from storage.urls import folder_name


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
        while not is_copy(folder, manifest):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(f".{folder.name}.lock"))
            try:
                with lock.acquire(timeout=0):
                    _make_room(folder, manifest)
                    fetch(store, prefix, folder, manifest)
                    break
            except Timeout:
                with lock:
                    pass  # another process was at it; look what has come of it
    except OSError as error:
        raise CacheError(
            f"{folder}: {store.url}/{prefix} cannot be copied there ({error.strerror or error}); "
            "make room, or set XDG_CACHE_HOME to a folder on another disk"
        ) from error
    return folder


def _make_room(folder: Path, manifest: Manifest) -> None:
    """Remove what killed processes have left; OSError without room for what is missing."""
    for file in (folder / name for name in manifest.files):
        for left in file.parent.glob(f"{escape(hidden(file.name))}*"):
            left.unlink()
    missing = sum(e.size for name, e in manifest.files.items() if not (folder / name).is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(f"{missing / 2**30:.1f} GiB are missing, {free / 2**30:.1f} GiB are free")
