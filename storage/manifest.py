"""The commit rule, once: files under a prefix exist when their manifest does, and it comes last.

`publish` writes, `publish_once` what several may write at once, `seal` what others have written;
`published` is the one test of
completeness, `fetch` and the readers verify what they read, `verify` everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Self, TypeAlias, TypeVar, cast

from pydantic import (
    Field,
    JsonValue,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)
from xxhash import xxh3_128

from storage.errors import DamagedError, MissingKey, StoreError
from storage.hashing import PIECE, Hashed, Hasher, PieceHasher
from storage.section import Section
from storage.store import Store, check_key

MANIFEST = "manifest.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PieceDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

Item = TypeVar("Item")
Result = TypeVar("Result")

Body: TypeAlias = Path | bytes | Callable[[], bytes | BinaryIO]
"""A file's content. A callable is called when its turn comes, so that a large whole never stands
in memory at once; a stream that it returns is read to its end and closed."""

# Files under way at once, up or down: enough to hide the latency of an object store.
_PARALLEL = 4


class FileEntry(Section):
    """One published file, with a digest of its whole content, of its pieces, or both."""

    size: NonNegativeInt
    """Bytes."""
    sha256: Digest | None = Field(default=None, exclude_if=lambda digest: digest is None)
    """Of the whole content. A rank's shards have none: they are many, nobody reads them whole, and
    XXH3 takes an eighth of the time."""
    xxh3: tuple[PieceDigest, ...] = Field(default=(), exclude_if=lambda pieces: not pieces)
    """Of each PIECE bytes, for a file that is read by range; empty for any other. They find damage,
    not a forger, who could write a manifest as well."""
    at: str | None = Field(default=None, exclude_if=lambda at: at is None)
    """Its name in the store where that is not its own: of files that several may write at once."""

    def key(self, prefix: str, name: str) -> str:
        """Where the file of this name lies."""
        return f"{prefix}/{self.at or name}"

    @field_validator("at")
    @classmethod
    def _stays_inside(cls, at: str | None) -> str | None:
        return at if at is None else _checked(at)

    @model_validator(mode="after")
    def _has_a_digest(self) -> Self:
        if self.sha256 is None and not self.xxh3:
            raise ValueError("a file without a digest")
        return self

    def like(self, other: FileEntry) -> bool:
        """Whether both are of the same content, by every digest that both have."""
        pairs = ((self.sha256, other.sha256), (self.xxh3, other.xxh3))
        known = [mine == theirs for mine, theirs in pairs if mine and theirs]
        return self.size == other.size and bool(known) and all(known)

    def hasher(self) -> Hasher:
        """What `is_of` is asked about once it has seen the content."""
        return PieceHasher() if self.sha256 is None else hashlib.sha256()

    def is_of(self, hasher: Hasher) -> bool:
        """Whether the content is the published one."""
        if isinstance(hasher, PieceHasher):
            return hasher.pieces() == self.xxh3
        return hasher.hexdigest() == self.sha256


class Manifest(Section):
    """What a prefix holds."""

    files: dict[str, FileEntry]
    """By name, relative to the prefix."""
    meta: dict[str, JsonValue] = Field(default_factory=dict)
    """Small facts about the whole, such as a loss or what it was made from."""
    digest: Digest | None = Field(default=None, exclude_if=lambda digest: digest is None)
    """Of the manifest itself without this; those of the first version have none."""

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            _checked(name)
        return files

    @property
    def stored(self) -> frozenset[str]:
        """The names of the files as they lie under the prefix."""
        return frozenset(entry.at or name for name, entry in self.files.items())


def alike(one: Manifest | None, other: Manifest) -> bool:
    """Whether both publish the same. A copy may have other kinds of digests than what it is of."""
    if one is None or one.meta != other.meta or one.files.keys() != other.files.keys():
        return False
    return all(one.files[name].like(entry) for name, entry in other.files.items())


def in_common(one: Manifest | None, other: Manifest) -> dict[str, FileEntry]:
    """The entries of `one` whose files the other has too: the same names, the same content."""
    files = one.files if one else {}
    return {
        name: entry
        for name, entry in files.items()
        if name in other.files and entry.like(other.files[name])
    }


def publish(
    store: Store,
    prefix: str,
    files: Mapping[str, Body],
    meta: Mapping[str, JsonValue] | None = None,
    kept: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Write the files, then the manifest: only then do they exist.

    An earlier publication under the prefix is taken back first, and those of its files that are
    not written again are removed, but for `kept` ones, which are published again as they lie.
    Raises ValueError for NaN in `meta`, before anything is written.
    """
    json.dumps(meta or {}, allow_nan=False)
    _check_names(files)
    kept = kept or {}
    stale = _listed(store, prefix) - {*files, *(entry.at or n for n, entry in kept.items())}
    store.remove(f"{prefix}/{MANIFEST}")
    written = in_parallel(partial(_write, store, prefix), files.items())
    for name in stale:
        store.remove(f"{prefix}/{name}")
    return commit(store, prefix, {**kept, **dict(zip(files, written, strict=True))}, meta)


def publish_once(
    store: Store,
    prefix: str,
    files: Mapping[str, Body],
    meta: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Publish what others may be making at the same time, all alike, if not to the last bit: what
    is published is left as it is, and never taken back while somebody reads it.

    Everybody's files have names of their own in the store. Of several manifests the last stays, and
    the files of the others are found by storage.garbage.
    """
    there = published(store, prefix)
    if there is not None:
        return there
    json.dumps(meta or {}, allow_nan=False)
    _check_names(files)
    token = secrets.token_hex(4)

    def write(item: tuple[str, Body]) -> FileEntry:
        at = f"{token}-{item[0]}"
        return _write(store, prefix, (at, item[1])).model_copy(update={"at": at})

    return commit(
        store, prefix, dict(zip(files, in_parallel(write, files.items()), strict=True)), meta
    )


def commit(
    store: Store,
    prefix: str,
    files: Mapping[str, FileEntry],
    meta: Mapping[str, JsonValue] | None = None,
) -> Manifest:
    """Publish files that are already written, by writing their manifest.

    In one step: until it is done, whatever was published there before still is.
    """
    manifest = Manifest(files=dict(files), meta=dict(meta or {}))
    sealed = manifest.model_copy(update={"digest": _digest(manifest)})
    store.write(f"{prefix}/{MANIFEST}", sealed.model_dump_json(indent=1).encode())
    return manifest


def seal(store: Store, prefix: str) -> Manifest:
    """Publish the files that lie under a prefix, whoever wrote them, with the digests that they
    have now."""

    def read(key: str) -> FileEntry:
        whole, pieces = hashlib.sha256(), PieceHasher()
        with store.read(key) as stream:
            hashed = Hashed(stream, whole, pieces)
            while hashed.read(PIECE):
                pass
        return FileEntry(size=hashed.size, sha256=whole.hexdigest(), xxh3=pieces.pieces())

    keys = list(store.keys(prefix))
    names = [key[len(prefix) + 1 :] for key in keys]
    return commit(store, prefix, dict(zip(names, in_parallel(read, keys), strict=True)))


def published(store: Store, prefix: str) -> Manifest | None:
    """The manifest, or None: the one test of completeness; load, resume, retention ask here."""
    return twice(partial(_published, store, prefix))


def all_published(store: Store, prefixes: Sequence[str]) -> bool:
    """Whether every one of these prefixes has its manifest. Asked of the listings of the prefixes
    above them, so that hundreds cost a few requests; what is damaged counts as there."""
    above = {prefix.rpartition("/")[0] for prefix in prefixes}
    there = {key for prefix in above for key in store.keys(prefix)}
    return there.issuperset(f"{prefix}/{MANIFEST}" for prefix in prefixes)


def fetch(store: Store, prefix: str, folder: Path, manifest: Manifest | None = None) -> Manifest:
    """Bring every file into the folder, verified; whole ones already there are left alone.

    Each file appears under its name only when its size and digest are right. Raises `MissingKey`
    when nothing is published, `DamagedError` naming the file that differs.
    """
    manifest = manifest or _required(store, prefix)

    def bring(item: tuple[str, FileEntry]) -> None:
        twice(partial(_fetch_file, store, prefix, folder, item))

    in_parallel(bring, manifest.files.items())
    return manifest


def hidden(name: str) -> str:
    """What the names of files begin with that a fetch of this one has not finished."""
    return f".{name[:100]}."


def is_copy(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds every file, whole."""
    paths = [(folder / name, entry) for name, entry in manifest.files.items()]
    # What is not there is seen before what is there is read.
    return all(path.is_file() and path.stat().st_size == e.size for path, e in paths) and all(
        in_parallel(lambda item: _is_of(*item), paths)
    )


def read_bytes(store: Store, prefix: str, name: str, manifest: Manifest | None = None) -> bytes:
    """One published file, verified; pass the manifest when several are read.

    Raises `MissingKey` when nothing is published or has that name, else `DamagedError`.
    """
    manifest = manifest or _required(store, prefix)
    if name not in manifest.files:
        raise MissingKey(f"{_where(store, f'{prefix}/{name}')}: not among the published files")
    entry = manifest.files[name]
    key = entry.key(prefix, name)

    def read() -> bytes:
        try:
            with store.read(key) as stream:
                content = stream.read()
        except MissingKey:
            raise _gone(store, prefix, key) from None
        hasher = entry.hasher()
        hasher.update(content)
        _verify(store, prefix, key, entry, len(content), hasher)
        return content

    return twice(read)


def read_pieces(
    store: Store, prefix: str, name: str, entry: FileEntry, first: int, into: memoryview
) -> None:
    """Fill `into` with whole pieces of a published file in pieces, from number `first` on,
    verified; the file's last piece may be shorter than others.

    Raises `DamagedError` naming the file.
    """
    twice(partial(_read_pieces, store, prefix, name, entry, first, into))


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
        key, hasher, size = entry.key(prefix, name), entry.hasher(), 0
        try:
            with store.read(key) as source:
                while chunk := source.read(1 << 20):
                    hasher.update(chunk)
                    size += len(chunk)
        except MissingKey:
            raise _gone(store, prefix, key) from None
        _verify(store, prefix, key, entry, size, hasher)

    in_parallel(lambda item: twice(partial(check, item)), manifest.files.items())
    return manifest


def withdraw(store: Store, prefix: str) -> None:
    """Take back whatever is published at or below the prefix: manifests first, then files."""
    keys = list(store.keys(prefix))
    manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
    for key in manifests:
        store.remove(key)
    for key in set(keys) - set(manifests):
        store.remove(key)


def twice(read: Callable[[], Result]) -> Result:
    """Read once more what came damaged: it may be the network's doing."""
    try:
        return read()
    except DamagedError:
        return read()


def _published(store: Store, prefix: str) -> Manifest | None:
    key = f"{prefix}/{MANIFEST}"
    try:
        with store.read(key) as stream:
            text = stream.read()
    except MissingKey:
        return None
    try:
        sealed = Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DamagedError(
            f"{_where(store, key)}: not a manifest ({reason}); {_remedy(prefix)}"
        ) from None
    manifest = sealed.model_copy(update={"digest": None})
    if sealed.digest is not None and sealed.digest != _digest(manifest):
        raise DamagedError(
            f"{_where(store, key)}: not what was written (another digest); {_remedy(prefix)}"
        )
    return manifest


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def _read_pieces(
    store: Store, prefix: str, name: str, entry: FileEntry, first: int, into: memoryview
) -> None:
    start, key = first * PIECE, entry.key(prefix, name)
    try:
        got = store.read_into(key, start, into)
    except MissingKey:
        raise _gone(store, prefix, key) from None
    where = _where(store, key)
    if got < len(into):
        raise DamagedError(
            f"{where}: ends at {start + got} bytes, but {entry.size} were published; "
            f"{_remedy(prefix)}"
        )
    for at in range(0, len(into), PIECE):
        number = first + at // PIECE
        if xxh3_128(into[at : at + PIECE]).hexdigest() != entry.xxh3[number]:
            raise DamagedError(
                f"{where}: its bytes from {number * PIECE} on are not what was published (another "
                f"digest); {_remedy(prefix)}"
            )


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if check_key(name) == MANIFEST:
            raise StoreError(f"{name!r}: not a key for a file; it is the manifest's own name")


def _checked(name: str) -> str:
    """For validators, which say so with ValueError."""
    try:
        _check_names([name])
    except StoreError as error:
        raise ValueError(str(error)) from None
    return name


def _write(store: Store, prefix: str, item: tuple[str, Body]) -> FileEntry:
    name, body = item
    key = f"{prefix}/{name}"
    content = (
        body.open("rb") if isinstance(body, Path) else body if isinstance(body, bytes) else body()
    )
    if isinstance(content, bytes):
        store.write(key, content)
        return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    whole, pieces = hashlib.sha256(), PieceHasher()
    with content:
        hashed = Hashed(content, whole, pieces)
        store.write(key, cast("BinaryIO", hashed))
    return FileEntry(size=hashed.size, sha256=whole.hexdigest(), xxh3=pieces.pieces())


def _fetch_file(store: Store, prefix: str, folder: Path, item: tuple[str, FileEntry]) -> None:
    name, entry = item
    target = folder / name
    if target.is_file() and _is_of(target, entry):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=hidden(target.name), dir=target.parent)
    path = Path(temporary)
    key, hasher, size = entry.key(prefix, name), entry.hasher(), 0
    try:
        with os.fdopen(handle, "wb") as stream, store.read(key) as source:
            while chunk := source.read(1 << 20):
                stream.write(chunk)
                hasher.update(chunk)
                size += len(chunk)
        _verify(store, prefix, key, entry, size, hasher)
        # mkstemp makes files that only their owner reads.
        path.chmod(0o644)
        path.replace(target)
    except MissingKey:
        raise _gone(store, prefix, key) from None
    finally:
        path.unlink(missing_ok=True)


def _is_of(path: Path, entry: FileEntry) -> bool:
    hasher = entry.hasher()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return entry.is_of(hasher)


def _verify(
    store: Store, prefix: str, key: str, entry: FileEntry, size: int, hasher: Hasher
) -> None:
    where = _where(store, key)
    if size != entry.size:
        raise DamagedError(
            f"{where}: {size} bytes, but {entry.size} were published; {_remedy(prefix)}"
        )
    if not entry.is_of(hasher):
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
    return set(manifest.stored) if manifest else set()


def in_parallel(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `act` gives for each, in their order; a few at a time, since a store answers slowly and
    digests are made without Python's lock."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(act, items))


def _gone(store: Store, prefix: str, key: str) -> DamagedError:
    return DamagedError(f"{_where(store, key)}: published, but no longer there; {_remedy(prefix)}")


def _where(store: Store, key: str) -> str:
    return f"{store.url}/{key}"


def _remedy(prefix: str) -> str:
    return f"remove {prefix} from the store and run the stage that writes it again"
