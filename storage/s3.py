"""A store in an S3 bucket, or in whatever speaks S3, through s3fs.

An object appears when its upload completes. A killed upload of a large body leaves unlisted parts
in the bucket: give the bucket a lifecycle rule that ends incomplete multipart uploads.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError
from s3fs import S3FileSystem

from storage.errors import MissingKey, StoreError
from storage.store import StoreOptions, check_key

if TYPE_CHECKING:
    from storage.store import Store

# Up to 10,000 parts: objects of 160 GB. `_IN_FLIGHT` of them are in memory for each upload.
_PART = 16 * 2**20
_IN_FLIGHT = 4
# Objects up to this size are read by one request, larger ones piece by piece.
_WHOLE = 32 * 2**20
_PIECE = 8 * 2**20


def open_s3(url: str, options: StoreOptions) -> S3Store:
    """Open `s3://bucket/prefix` and list it once.

    Raises `StoreError` when the server cannot be reached, the bucket does not exist or the
    credentials are missing or refused.
    """
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if not parts.netloc or parts.query or parts.fragment:
        raise StoreError(f"{url}: an S3 store is written s3://bucket/prefix")
    if prefix:
        check_key(prefix)
    region = options.region or os.environ.get("AWS_REGION")
    files = S3FileSystem(
        endpoint_url=options.endpoint,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": 3,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "request_checksum_calculation": options.checksum,
            "response_checksum_validation": options.checksum,
        },
        # An instance remembers credentials, a listing goes stale as others write.
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    store = S3Store(files, parts.netloc, prefix)
    store.probe()
    return store


class S3Store:
    """Keys are object names below the prefix."""

    def __init__(self, files: S3FileSystem, bucket: str, prefix: str) -> None:
        self._files = files
        self._bucket = bucket
        self._prefix = prefix

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def probe(self) -> None:
        """One listing of one key; raises `StoreError` when the store cannot be used."""
        try:
            with self._translated(""):
                self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except MissingKey:
            raise self._no_bucket() from None

    def read(self, key: str) -> BinaryIO:
        name = self._name(key)
        with self._translated(key):
            size = int(self._call("head_object", Key=name)["ContentLength"])
        if size <= _WHOLE:
            return io.BytesIO(self.ranged(key, 0, size))
        return io.BufferedReader(_Ranges(self, key, size), _PIECE)

    def ranged(self, key: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, both inside the object."""
        if start == end:
            return b""  # there is no empty range in HTTP
        with self._translated(key):
            path = f"{self._bucket}/{self._name(key)}"
            return cast(bytes, self._files.cat_file(path, start=start, end=end))

    def write(self, key: str, body: BinaryIO | bytes) -> None:
        name = self._name(key)
        stream = io.BytesIO(body) if isinstance(body, bytes) else body
        first = _part(stream)
        try:
            with self._translated(key):
                if len(first) < _PART:
                    self._call("put_object", Key=name, Body=first)
                else:
                    self._write_parts(name, first, stream)
        except MissingKey:  # some servers list a bucket that is not there as an empty one
            raise self._no_bucket() from None

    def keys(self, prefix: str) -> Iterator[str]:
        start = self._name(prefix) if prefix else self._prefix
        more: dict[str, str] = {}
        found: list[str] = []
        with self._translated(prefix):
            while True:
                page = self._call("list_objects_v2", Prefix=f"{start}/" if start else "", **more)
                found += [item["Key"] for item in page.get("Contents", [])]
                if not page.get("IsTruncated"):
                    break
                more = {"ContinuationToken": page["NextContinuationToken"]}
        skip = len(self._prefix) + 1 if self._prefix else 0
        # A name that ends in "/" is some other tool's mark for a folder.
        return iter(sorted(name[skip:] for name in found if not name.endswith("/")))

    def remove(self, key: str) -> None:
        name = self._name(key)
        # S3 says nothing about an absent key; some servers do.
        with suppress(MissingKey), self._translated(key):
            self._call("delete_object", Key=name)

    def _write_parts(self, name: str, first: bytes, stream: BinaryIO) -> None:
        upload = self._call("create_multipart_upload", Key=name)["UploadId"]

        def send(number: int, chunk: bytes) -> dict[str, Any]:
            sent = self._call(
                "upload_part", Key=name, UploadId=upload, PartNumber=number, Body=chunk
            )
            return {"PartNumber": number, "ETag": sent["ETag"]}

        parts: list[dict[str, Any]] = []
        chunks = [first]
        try:
            with ThreadPoolExecutor(_IN_FLIGHT) as pool:
                while chunks:
                    numbers = range(len(parts) + 1, len(parts) + 1 + len(chunks))
                    parts += pool.map(send, numbers, chunks)
                    chunks = [c for _ in range(_IN_FLIGHT) if (c := _part(stream))]
            self._call(
                "complete_multipart_upload",
                Key=name,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            )
        except BaseException:
            with suppress(OSError, BotoCoreError):  # the first failure is the one to tell
                self._call("abort_multipart_upload", Key=name, UploadId=upload)
            raise

    def _no_bucket(self) -> StoreError:
        return StoreError(f"{self.url}: the bucket {self._bucket} does not exist; create it first")

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return cast(dict[str, Any], self._files.call_s3(method, Bucket=self._bucket, **arguments))

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turn what s3fs and botocore raise into our errors, where it enters."""
        where = f"{self.url}/{key}".rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            raise MissingKey(f"{where}: nothing is stored there") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(
                f"{where}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE"
            ) from error
        except PermissionError as error:
            raise StoreError(
                f"{where}: the server refuses the AWS credentials ({_sentence(error)}); check the "
                "key, its secret and its rights on the bucket"
            ) from error
        except (OSError, BotoCoreError) as error:
            raise StoreError(
                f"{where}: the store does not answer as it should ({_sentence(error)}); check the "
                "endpoint and the network"
            ) from error


class _Ranges(io.RawIOBase):
    """A large object, one ranged request a read; errors come out as ours."""

    def __init__(self, store: S3Store, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = min(self._at, self._size)
        content = self._store.ranged(self._key, start, min(start + len(buffer), self._size))
        buffer[: len(content)] = content
        self._at = start + len(content)
        return len(content)

    def readall(self) -> bytes:
        # The inherited one would send a request for every 8 KiB.
        content = bytearray(max(0, self._size - self._at))
        view, done = memoryview(content), 0
        while done < len(content):
            done += self.readinto(view[done : done + _PIECE])
        return bytes(content)


def _part(stream: BinaryIO) -> bytes:
    """The next `_PART` bytes; fewer only at the end, where one read may stop anywhere."""
    pieces = []
    left = _PART
    while left and (piece := stream.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _sentence(error: Exception) -> str:
    """The error's own words on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


if TYPE_CHECKING:
    _: type[Store] = S3Store
