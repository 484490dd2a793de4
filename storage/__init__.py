"""Where does it live? Stores, manifests, tensors, checkpoints, the layout and the registry.

Nothing counts until its manifest is written, last; nothing that is read back is unpickled.
"""

from storage.checkpoint import Checkpoint, keep_last, latest_checkpoint, save_checkpoint
from storage.digest import digest_files, digest_json, sha256_file
from storage.errors import DamagedError, EspalierError, MissingKey, StoreError
from storage.manifest import (
    FileEntry,
    Manifest,
    fetch,
    publish,
    published,
    read_bytes,
    read_json,
    withdraw,
)
from storage.section import Section
from storage.store import Store, StoreOptions, open_store
from storage.tensors import check_safetensors, load_tensors, save_tensors

__all__ = [
    "Checkpoint",
    "DamagedError",
    "EspalierError",
    "FileEntry",
    "Manifest",
    "MissingKey",
    "Section",
    "Store",
    "StoreError",
    "StoreOptions",
    "check_safetensors",
    "digest_files",
    "digest_json",
    "fetch",
    "keep_last",
    "latest_checkpoint",
    "load_tensors",
    "open_store",
    "publish",
    "published",
    "read_bytes",
    "read_json",
    "save_checkpoint",
    "save_tensors",
    "sha256_file",
    "withdraw",
]
