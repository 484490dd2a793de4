"""The commit rule, once: files under a prefix exist when their manifest does, and it comes last.

`publish` writes, `published` is the one test of completeness, `fetch` and the readers verify what
they read, `verify` everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from pydantic import Field, JsonValue, NonNegativeInt, ValidationError, field_validator

from storage.digest import sha256_file
from storage.errors import DamagedError, MissingKey, StoreError
from storage.section import Section
from storage.store import Store, check_key

MANIFEST = "manifest.json"

Item = TypeVar("Item")
Result = TypeVar("Result")

Body: TypeAlias = Path | bytes | Callable[[], bytes]
"""A file's content. A callable is called when its turn comes, so that a large whole never stands
in memory at once."""

# Files under way at once, up or down: enough to hide the latency of an object store.
_PARALLEL = 4


class FileEntry(Section):
    """One published file."""

    size: NonNegativeInt
    """Bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the whole content."""


class Manifest(Section):
    """What a prefix holds."""

    files: dict[str, FileEntry]
    """By name, relative to the prefix."""
    meta: dict[str, JsonValue] = Field(default_factory=dict)
    """Small facts about the whole, such as a loss or what it was made from."""

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        try:
            _check_names(files)
        except StoreError as error:
            raise ValueError(str(error)) from None
        return files


def publish(
    store: Store,
    prefix: str,
    files: Mapping[str, Body],
    meta: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Write the files, then the manifest: only then do they exist.

    An earlier publication under the prefix is taken back first, and those of its files that are
    not written again are removed. Raises ValueError for NaN in `meta`, before anything is written.
    """
    json.dumps(meta or {}, allow_nan=False)
    _check_names(files)
    stale = _listed(store, prefix) - set(files)
    store.remove(f"{prefix}/{MANIFEST}")
    written = _in_parallel(partial(_write, store, prefix), files.items())
    for name in stale:
        store.remove(f"{prefix}/{name}")
    manifest = Manifest(files=dict(zip(files, written, strict=True)), meta=dict(meta or {}))
    store.write(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
    return manifest


def published(store: Store, prefix: str) -> Manifest | None:
    """The manifest, or None: the one test of completeness; load, resume, retention ask here."""
    key = f"{prefix}/{MANIFEST}"
    try:
        with store.read(key) as stream:
            text = stream.read()
    except MissingKey:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DamagedError(
            f"{_where(store, key)}: not a manifest ({reason}); {_remedy(prefix)}"
        ) from None


def fetch(store: Store, prefix: str, folder: Path, manifest: Manifest | None = None) -> Manifest:
    """Bring every file into the folder, verified; whole ones already there are left alone.

    Each file appears under its name only when its size and digest are right. Raises `MissingKey`
    when nothing is published, `DamagedError` naming the file that differs.
    """
    manifest = manifest or _required(store, prefix)
    _in_parallel(partial(_fetch_file, store, prefix, folder), manifest.files.items())
    return manifest


def read_bytes(store: Store, prefix: str, name: str, manifest: Manifest | None = None) -> bytes:
    """One published file, verified; pass the manifest when several are read.

    Raises `MissingKey` when nothing is published or has that name, else `DamagedError`.
    """
    manifest = manifest or _required(store, prefix)
    key = f"{prefix}/{name}"
    if name not in manifest.files:
        raise MissingKey(f"{_where(store, key)}: not among the published files")
    entry = manifest.files[name]
    try:
        with store.read(key) as stream:
            content = stream.read()
    except MissingKey:
        raise _gone(store, prefix, name) from None
    _verify(store, prefix, name, entry, len(content), hashlib.sha256(content).hexdigest())
    return content


def read_json(store: Store, prefix: str, name: str, manifest: Manifest | None = None) -> JsonValue:
    """One published JSON file, verified."""
    content = read_bytes(store, prefix, name, manifest)
    try:
        value: JsonValue = json.loads(content)
    except ValueError as error:
        raise DamagedError(
            f"{_where(store, f'{prefix}/{name}')}: not JSON ({error}); {_remedy(prefix)}"
        ) from None
    return value


def verify(store: Store, prefix: str) -> Manifest:
    """Read every published file and hold it against its size and digest; nothing is kept.

    Raises `MissingKey` when nothing is published, `DamagedError` naming the file that differs.
    """
    manifest = _required(store, prefix)

    def check(item: tuple[str, FileEntry]) -> None:
        name, entry = item
        digest, size = hashlib.sha256(), 0
        try:
            with store.read(f"{prefix}/{name}") as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
        except MissingKey:
            raise _gone(store, prefix, name) from None
        _verify(store, prefix, name, entry, size, digest.hexdigest())

    _in_parallel(check, manifest.files.items())
    return manifest


def withdraw(store: Store, prefix: str) -> None:
    """Take back whatever is published at or below the prefix: manifests first, then files."""
    keys = list(store.keys(prefix))
    manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
    for key in manifests:
        store.remove(key)
    for key in set(keys) - set(manifests):
        store.remove(key)


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if check_key(name) == MANIFEST:
            raise StoreError(f"{name!r}: not a key for a file; it is the manifest's own name")


def _write(store: Store, prefix: str, item: tuple[str, Body]) -> FileEntry:
    name, body = item
    key = f"{prefix}/{name}"
    if isinstance(body, Path):
        entry = FileEntry(size=body.stat().st_size, sha256=sha256_file(body))
        with body.open("rb") as stream:
            store.write(key, stream)
        return entry
    content = body if isinstance(body, bytes) else body()
    store.write(key, content)
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _fetch_file(store: Store, prefix: str, folder: Path, item: tuple[str, FileEntry]) -> None:
    name, entry = item
    target = folder / name
    if target.is_file() and sha256_file(target) == entry.sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    path = Path(temporary)
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(handle, "wb") as stream, store.read(f"{prefix}/{name}") as source:
            while chunk := source.read(1 << 20):
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        _verify(store, prefix, name, entry, size, digest.hexdigest())
        # mkstemp makes files that only their owner reads.
        path.chmod(0o644)
        path.replace(target)
    except MissingKey:
        raise _gone(store, prefix, name) from None
    finally:
        path.unlink(missing_ok=True)


def _verify(store: Store, prefix: str, name: str, entry: FileEntry, size: int, sha256: str) -> None:
    where = _where(store, f"{prefix}/{name}")
    if size != entry.size:
        raise DamagedError(
            f"{where}: {size} bytes, but {entry.size} were published; {_remedy(prefix)}"
        )
    if sha256 != entry.sha256:
        raise DamagedError(
            f"{where}: its content is not what was published (another digest); {_remedy(prefix)}"
        )


def _required(store: Store, prefix: str) -> Manifest:
    manifest = published(store, prefix)
    if manifest is None:
        raise MissingKey(
            f"{_where(store, prefix)}: nothing is published there; run the stage that writes it"
        )
    return manifest


def _listed(store: Store, prefix: str) -> set[str]:
    try:
        manifest = published(store, prefix)
    except DamagedError:
        return set()  # about to be replaced
    return set(manifest.files) if manifest else set()


def _in_parallel(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(act, items))


def _gone(store: Store, prefix: str, name: str) -> DamagedError:
    return DamagedError(
        f"{_where(store, f'{prefix}/{name}')}: published, but no longer there; {_remedy(prefix)}"
    )


def _where(store: Store, key: str) -> str:
    return f"{store.url}/{key}"


def _remedy(prefix: str) -> str:
    return f"remove {prefix} from the store and run the stage that writes it again"
