"""Bytes under keys, on a local folder or on S3: four methods, and opening a store by its URL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, PositiveFloat

from storage.errors import StoreError
from storage.section import Section
from storage.urls import address


class StoreOptions(Section):
    """How an S3 store is reached, and a teacher or pictures in S3; a folder needs none of it.

    Credentials are never among them: they come from the AWS environment variables or files.
    """

    endpoint: Annotated[str, AfterValidator(address)] | None = None
    """Address of an S3-compatible server; null leaves it to AWS_ENDPOINT_URL, then to AWS."""
    region: str | None = None
    """Region of the bucket; null leaves it to AWS_REGION or AWS_DEFAULT_REGION."""
    checksum: Literal["when_required", "when_supported"] = "when_required"
    """When requests and responses carry a checksum of the transport. Many S3-compatible servers
    get the optional ones wrong on ranged reads; manifests verify every file in any case."""
    timeout: PositiveFloat = 60.0
    """Seconds without an answer after which a request is tried again."""


class Unfinished(NamedTuple):
    """A write that has not ended: one under way, or one whose writer was killed."""

    key: str
    """Of a folder store the name of the unfinished file, which does not tell the key."""
    id: str
    seconds: float
    """Since it began, by the store's own clock."""


class Stored(NamedTuple):
    """A body under a key."""

    key: str
    size: int
    """Bytes."""
    seconds: float
    """Since it was written, by the store's own clock."""


class Store(Protocol):
    """Bytes under keys. Knows no plan, no checkpoint.

    A key is relative and uses "/" (see `check_key`); it stays a `str`, since `Path` breaks URLs.
    Methods may be called from several threads. A store does not survive a fork and is not sent
    between processes: send `url` and the options, and open it there.
    """

    @property
    def url(self) -> str:
        """What `open_store` opens this store by, from any working directory."""
        ...

    def read(self, key: str) -> BinaryIO:
        """The seekable body, at its start; the caller closes it. Raises `MissingKey`."""
        ...

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer from byte `start` of the body on; how many bytes there were, fewer than
        the buffer's where the body ends. Raises `MissingKey`."""
        ...

    def write(self, key: str, body: BinaryIO | bytes) -> None:
        """Store the body, all or nothing: an exception or a kill leaves the key as it was.

        A stream is read from its current position to its end, and left open.
        """
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key under the prefix, sorted; "" is the whole store.

        The prefix counts by whole parts: "a/b" holds "a/b/c", not "a/bc" and not "a/b".
        """
        ...

    def remove(self, key: str) -> None:
        """Remove the key; an absent one is fine, so that a removal can be repeated."""
        ...

    def listing(self, prefix: str) -> Iterator[Stored]:
        """What `keys` lists, with sizes and ages."""
        ...

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Writes under the prefix that have not ended; "" is the whole store."""
        ...

    def discard(self, write: Unfinished) -> None:
        """Take an unfinished write's bytes away; its writer, if it lives, fails."""
        ...


def open_store(url: str, options: StoreOptions | None = None, *, patient: bool = False) -> Store:
    """Open a store by a plain path, `file://…` or `s3://bucket/prefix`, and try it once.

    Raises `StoreError` in one sentence when it cannot be reached, refuses the credentials, or does
    not exist: within seconds, unless `patient`, as a worker is that may have been started again
    while the store was out. Every later request is patient.
    """
    # Either implementation imports this module; s3fs also costs a second of start-up.
    from storage.folder import open_folder

    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme == "s3":
        from storage.s3 import open_s3

        return open_s3(url, options or StoreOptions(), patient)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{url}: a file URL starts with file:///, then an absolute path")
        return open_folder(unquote(parts.path))
    if scheme or not url:
        raise StoreError(
            f"{url!r}: not a store; give a folder, file:///folder or s3://bucket/prefix"
        )
    return open_folder(url)


def discard_unfinished(store: Store, prefix: str) -> None:
    """Take away what writes under the prefix that were cut off have left; none may be under way."""
    for write in store.unfinished(prefix):
        store.discard(write)


def check_key(key: str) -> str:
    """The key itself, or `StoreError` unless it is relative, normal and printable."""
    parts = key.split("/")
    if not key.isprintable() or "\\" in key or any(part in ("", ".", "..") for part in parts):
        raise StoreError(
            f"{key!r}: not a key; keys are names joined by single slashes, without . or .. parts"
        )
    return key
