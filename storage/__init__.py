"""Where does it live? Stores, manifests, tensors, checkpoints, the layout and the registry.

Nothing counts until its manifest is written, last; nothing that is read back is unpickled.
"""

from storage.checkpoint import Checkpoint, Saver, keep_last, latest_checkpoint
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
from storage.shards import publish_tensors
from storage.store import Store, StoreOptions, open_store
from storage.stored import StoredTensors, open_tensors
from storage.tensors import check_safetensors, load_tensors, save_tensors

__all__ = [
    "Checkpoint",
    "DamagedError",
    "EspalierError",
    "FileEntry",
    "Manifest",
    "MissingKey",
    "Saver",
    "Section",
    "Store",
    "StoreError",
    "StoreOptions",
    "StoredTensors",
    "check_safetensors",
    "digest_files",
    "digest_json",
    "fetch",
    "keep_last",
    "latest_checkpoint",
    "load_tensors",
    "open_store",
    "open_tensors",
    "publish",
    "publish_tensors",
    "published",
    "read_bytes",
    "read_json",
    "save_tensors",
    "sha256_file",
    "withdraw",
]
