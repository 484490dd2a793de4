"""A store in an S3 bucket, or in whatever speaks S3, through s3fs.

An object appears when its upload completes. Every request is tried again by itself, a part of a
large body like any other. A killed upload leaves unlisted parts in the bucket, which cost money
until somebody ends it: `unfinished` finds them, for a saver that starts again and for
`espalier gc`.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

from aiohttp import ClientError as ConnectionBroken
from botocore.exceptions import (
    BotoCoreError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NotConnected
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from storage.errors import MissingKey, StoreError
from storage.retry import Patience, retried
from storage.store import Stored, StoreOptions, Unfinished, check_key

if TYPE_CHECKING:
    from storage.store import Store

# Up to 10,000 parts: objects of 160 GB. `_IN_FLIGHT` of them are in memory, of all uploads of a
# store together, and one more for each upload.
_PART = 16 * 2**20
_IN_FLIGHT = 6
# What is read of an object to learn its size; objects up to the next are read by one more request,
# larger ones piece by piece.
_SMALL = 2**20
_WHOLE = 32 * 2**20
_PIECE = 8 * 2**20
# The most of an answer that is copied at a time.
_RECEIVED = 2**18
# Bytes a second that a server must take of a body. Nothing else ends a wait for it to take more, or
# for its word that the body may come.
_SLOWEST = 2**19
# Outlasts a store that is out for five minutes, or lets eight requests wait in vain.
_PATIENCE = Patience(8, 300.0)
# A wrong address or network is told within seconds.
_TO_OPEN = Patience(3, 0.0)

# Error codes below 500 that pass by themselves. The clock is among them because the wrong time may
# be a load balancer's, one of several.
_PASSING = {"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "ThrottlingException"}
_PASSING |= {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "OperationAborted"}
# Connections that broke, and answers that did not come or were not S3's.
_BROKEN = (HTTPClientError, NotConnected, ResponseParserError, ConnectionBroken, OSError)


def open_s3(url: str, options: StoreOptions, patient: bool = False) -> S3Store:
    """Open `s3://bucket/prefix` and list it once; `patient` as for `open_store`.

    Raises `StoreError` when the server cannot be reached, the bucket does not exist or the
    credentials are missing or refused.
    """
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if not parts.netloc or parts.query or parts.fragment:
        raise StoreError(f"{url}: an S3 store is written s3://bucket/prefix")
    if prefix:
        check_key(prefix)
    reached = s3_arguments(options)
    # Ours are the only ones: botocore's and s3fs's own would multiply with them.
    reached["config_kwargs"] |= {
        "max_pool_connections": 64,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    files = S3FileSystem(
        **reached,
        # An instance remembers credentials, a listing goes stale as others write.
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    files.retries = 1
    store = S3Store(files, parts.netloc, prefix, options.timeout)
    try:
        store.probe(_PATIENCE if patient else _TO_OPEN)
    except ValueError as error:  # botocore's, of an endpoint that is no URL
        raise StoreError(
            f"{url}: {_sentence(error)}; an endpoint is written http://HOST:PORT or https://HOST"
        ) from error
    return store


def s3_arguments(options: StoreOptions) -> dict[str, Any]:
    """What s3fs is given to reach the server of these options."""
    region = options.region or os.environ.get("AWS_REGION")
    return {
        "endpoint_url": options.endpoint,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": {
            "connect_timeout": 3,
            "read_timeout": options.timeout,
            "request_checksum_calculation": options.checksum,
            "response_checksum_validation": options.checksum,
        },
    }


class Part(NamedTuple):
    """A part of an upload that has arrived."""

    number: int
    tag: str
    size: int


class S3Store:
    """Keys are object names below the prefix."""

    def __init__(self, files: S3FileSystem, bucket: str, prefix: str, timeout: float) -> None:
        self._files, self._timeout = files, timeout
        self._bucket = bucket
        self._prefix = prefix
        self._slots = threading.BoundedSemaphore(_IN_FLIGHT)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def probe(self, patience: Patience) -> None:
        """One listing of one key; raises `StoreError` when the store cannot be used."""
        try:
            with self._translated(""):
                self._call("list_objects_v2", patience, Prefix=self._prefix, MaxKeys=1)
        except MissingKey:
            raise self._no_bucket() from None

    def read(self, key: str) -> BinaryIO:
        name = self._name(key)

        def begin() -> tuple[int, bytes]:
            return cast("tuple[int, bytes]", sync(self._files.loop, self._beginning, name))

        # Most of what is read whole is a small manifest or state: one request, not two.
        with self._translated(key):
            size, first = retried(begin, _passes, _PATIENCE)
        if len(first) == size:
            return io.BytesIO(first)
        if size <= _WHOLE:
            content = bytearray(size)
            return io.BytesIO(content[: self.read_into(key, 0, memoryview(content))])
        return io.BufferedReader(_Ranges(self, key, size), _PIECE)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        name = self._name(key)

        def read() -> int:
            try:
                return cast(int, sync(self._files.loop, self._receive, name, start, buffer))
            except OSError as error:
                if _code(error) == "InvalidRange":
                    return 0  # the object ends before
                raise

        if not buffer:
            return 0  # there is no empty range in HTTP
        with self._translated(key):
            return retried(read, _passes, _PATIENCE)

    async def _beginning(self, name: str) -> tuple[int, bytes]:
        """The size of an object, and as much of it as one small request brings."""
        try:
            answer = await self._files._call_s3(
                "get_object", Bucket=self._bucket, Key=name, Range=f"bytes=0-{_SMALL - 1}"
            )
        except OSError as error:
            if _code(error) == "InvalidRange":
                return 0, b""  # an empty object has no range
            raise
        async with answer["Body"] as body:
            content: bytes = await body.read()
        # "bytes 0-1048575/5242880"; without one it is the whole object.
        whole = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
        return int(whole), content

    async def _receive(self, name: str, start: int, buffer: memoryview) -> int:
        """Copy an answer into the buffer as it comes in: s3fs would put it together first."""
        answer = await self._files._call_s3(
            "get_object",
            Bucket=self._bucket,
            Key=name,
            Range=f"bytes={start}-{start + len(buffer) - 1}",
        )
        done = 0
        async with answer["Body"] as body:
            while chunk := await body.read(_RECEIVED):
                if done + len(chunk) > len(buffer):
                    raise OSError(f"{name}: the server sent more than the range asked for")
                buffer[done : done + len(chunk)] = chunk
                done += len(chunk)
        return done

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
        except MissingKey as error:
            if _code(error.__cause__ or error) == "NoSuchUpload":
                raise StoreError(
                    f"{self.url}/{key}: its upload was ended by somebody else (another run that "
                    "writes there, `espalier gc` or a lifecycle rule of the bucket); run again"
                ) from None
            # Some servers list a bucket that is not there as an empty one.
            raise self._no_bucket() from None

    def keys(self, prefix: str) -> Iterator[str]:
        return (stored.key for stored in self.listing(prefix))

    def listing(self, prefix: str) -> Iterator[Stored]:
        found = [
            Stored(self._key(item["Key"]), int(item["Size"]), _age(page, item["LastModified"]))
            for page in self._pages(
                "list_objects_v2", prefix, {"NextContinuationToken": "ContinuationToken"}
            )
            for item in page.get("Contents", [])
            # A name that ends in "/" is some other tool's mark for a folder.
            if not item["Key"].endswith("/")
        ]
        return iter(sorted(found))

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        more = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        found: list[Unfinished] = []
        with suppress(MissingKey):  # how some servers say that there are none
            for page in self._pages("list_multipart_uploads", prefix, more):
                found += [
                    Unfinished(
                        self._key(item["Key"]), item["UploadId"], _age(page, item["Initiated"])
                    )
                    for item in page.get("Uploads", [])
                ]
        return iter(sorted(found))

    def discard(self, write: Unfinished) -> None:
        name = self._name(write.key)
        # It may have ended meanwhile.
        with suppress(MissingKey), self._translated(write.key):
            self._call("abort_multipart_upload", Key=name, UploadId=write.id)

    def remove(self, key: str) -> None:
        name = self._name(key)
        # S3 says nothing about an absent key; some servers do.
        with suppress(MissingKey), self._translated(key):
            self._call("delete_object", Key=name)

    def _write_parts(self, name: str, first: bytes, stream: BinaryIO) -> None:
        begun = time.monotonic()
        upload = self._call("create_multipart_upload", Key=name)["UploadId"]

        def send(number: int, chunk: bytes) -> Part:
            answer = self._call(
                "upload_part", Key=name, UploadId=upload, PartNumber=number, Body=chunk
            )
            return Part(number, answer["ETag"], len(chunk))

        parts: list[Part] = []
        under_way: deque[Future[Part]] = deque()
        chunk, number = first, 1
        try:
            with ThreadPoolExecutor(_IN_FLIGHT) as pool:
                try:
                    while chunk:
                        self._slots.acquire()
                        sent = pool.submit(send, number, chunk)
                        sent.add_done_callback(lambda _: self._slots.release())
                        under_way.append(sent)
                        while under_way and under_way[0].done():
                            parts.append(under_way.popleft().result())
                        chunk, number = _part(stream), number + 1
                    parts += [part.result() for part in under_way]
                finally:
                    pool.shutdown(cancel_futures=True)
            self._complete(name, upload, parts, begun)
        except BaseException:
            with suppress(OSError, BotoCoreError):  # the first failure is the one to tell
                # The store may have been out for minutes; what stays there is found later.
                brief = _PATIENCE._replace(seconds=0.0)
                self._call("abort_multipart_upload", brief, Key=name, UploadId=upload)
            raise

    def _complete(self, name: str, upload: str, parts: list[Part], begun: float) -> None:
        try:
            self._call(
                "complete_multipart_upload",
                Key=name,
                UploadId=upload,
                MultipartUpload={
                    "Parts": [{"PartNumber": part.number, "ETag": part.tag} for part in parts]
                },
            )
        except OSError as error:
            # The answer to an attempt that succeeded was lost; the next one finds no upload.
            size, seconds = sum(part.size for part in parts), time.monotonic() - begun
            if _code(error) != "NoSuchUpload" or not self._is_there(name, size, seconds):
                raise

    def _is_there(self, name: str, size: int, seconds: float) -> bool:
        """Whether an object of that size was written in the last seconds."""
        with suppress(FileNotFoundError):
            answer = self._call("head_object", Key=name)
            # Its time is given in whole seconds.
            young = _age(answer, answer["LastModified"]) <= seconds + 1
            return young and int(answer["ContentLength"]) == size
        return False

    def _pages(
        self, method: str, prefix: str, markers: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """The pages of a listing; `markers` say in an answer and in a request where one starts."""
        start = self._name(prefix) if prefix else self._prefix
        more: dict[str, Any] = {}
        with self._translated(prefix):
            while True:
                page = self._call(method, Prefix=f"{start}/" if start else "", **more)
                yield page
                if not page.get("IsTruncated"):
                    return
                more = {sent: page[found] for found, sent in markers.items() if page.get(found)}

    def _key(self, name: str) -> str:
        return name[len(self._prefix) + 1 :] if self._prefix else name

    def _no_bucket(self) -> StoreError:
        return StoreError(f"{self.url}: the bucket {self._bucket} does not exist; create it first")

    def _call(
        self, method: str, patience: Patience | None = None, **arguments: Any
    ) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            if "Body" in arguments:
                return cast("dict[str, Any]", sync(self._files.loop, self._send, method, arguments))
            answer = self._files.call_s3(method, Bucket=self._bucket, **arguments)
            return cast("dict[str, Any]", answer)

        return retried(call, _passes, patience or _PATIENCE)

    async def _send(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        size = len(arguments["Body"])
        limit = self._timeout + size / _SLOWEST
        try:
            async with asyncio.timeout(limit) as clock:
                answer = await self._files._call_s3(method, Bucket=self._bucket, **arguments)
                return cast("dict[str, Any]", answer)
        except TimeoutError as error:
            if not clock.expired():
                raise  # it took the body and does not answer
            # Of a TimeoutError fsspec drops the words.
            raise OSError(f"it did not take {size:,} bytes within {limit:.0f} s") from error

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _translated(self, key: str) -> AbstractContextManager[None]:
        return translated(f"{self.url}/{key}".rstrip("/"))


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what s3fs and botocore raise into our errors, where it enters."""
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
        if _code(error) == "RequestTimeTooSkewed":
            raise StoreError(
                f"{where}: the server refuses requests because the clocks differ "
                f"({_sentence(error)}); set this machine's clock"
            ) from error
        raise StoreError(
            f"{where}: the server refuses the AWS credentials ({_sentence(error)}); check the "
            "key, its secret and its rights on the bucket"
        ) from error
    except (OSError, BotoCoreError, ConnectionBroken) as error:
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
        view = memoryview(buffer).cast("B")[: self._size - start]
        done = self._store.read_into(self._key, start, view)
        self._at = start + done
        return done

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


def _age(answer: dict[str, Any], moment: datetime) -> float:
    """Seconds from a moment to an answer, both by the server's clock."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return (now - moment).total_seconds()


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    response = getattr(error.__cause__ or error, "response", None)
    if response is None:
        return isinstance(error, _BROKEN) and not isinstance(error, FileNotFoundError)
    status: int = response["ResponseMetadata"]["HTTPStatusCode"]
    return status >= 500 or status == 429 or _code(error) in _PASSING


def _code(error: BaseException) -> str:
    """The S3 error code behind an error that s3fs raised."""
    response = getattr(error.__cause__ or error, "response", None)
    return str(response["Error"].get("Code", "")) if response else ""


def _sentence(error: Exception) -> str:
    """The error's own words on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


if TYPE_CHECKING:
    _: type[Store] = S3Store
