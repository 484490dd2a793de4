"""Copies of published files on this machine, shared by all its processes.

They lie under $XDG_CACHE_HOME/espalier (~/.cache/espalier), may be deleted at any time, and are
verified against their manifest at every use.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from storage.manifest import Manifest, fetch
from storage.store import Store


def local_copy(
    store: Store, prefix: str, manifest: Manifest | None = None, cache: Path | None = None
) -> Path:
    """The folder that holds the files published under `prefix`, whole.

    `cache` takes the place of the user's cache folder.
    """
    if cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "espalier" / "copies"
    folder = cache / re.sub(r"[^A-Za-z0-9.-]+", "_", store.url).strip("_") / prefix
    fetch(store, prefix, folder, manifest)
    return folder
