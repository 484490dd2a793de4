"""A proxy in front of a real S3 server that breaks the requests it is told to break.

It forwards everything else as it is, `Host` included, so that signatures hold.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What a rule sees."""

    method: str
    path: str
    """With its query."""
    number: int
    """How many like it (same method, path and range) came before."""
    range: str | None

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber=" in self.path


@dataclass(frozen=True)
class Answer:
    """An error that S3 gives in place of the server's own answer."""

    status: int
    code: str


Fault = (
    Answer
    | Literal["stall", "hang", "reset", "reset after", "cut answer", "alter answer", "alter body"]
)
"""`stall` takes nothing of a body, `hang` all of it and says nothing; `reset` before the server
sees the request, `reset after` once it has done what was asked."""

Rule = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """What to break, and what has been broken."""

    target: str
    endpoint: str = ""
    rule: Rule = lambda request: None
    broken: list[tuple[Request, Fault]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    seen: dict[tuple[str, str, str | None], int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, method: str, path: str, span: str | None) -> Fault | None:
        with self.lock:
            number = self.seen.get((method, path, span), 0)
            self.seen[method, path, span] = number + 1
            request = Request(method, path, number, span)
            fault = self.rule(request)
            if fault is not None:
                self.broken.append((request, fault))
            return fault


@contextmanager
def proxying(target: str) -> Iterator[Proxy]:
    """A proxy to the server at `target`, ended with the block."""
    proxy = Proxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            fault = proxy.judge(self.command, self.path, self.headers.get("Range"))
            if fault == "stall":
                proxy.closing.wait(60)
                self._reset()
                return
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with suppress(ConnectionError, BrokenPipeError):
                self._answer(body, fault)

        def handle_expect_100(self) -> bool:
            return True  # who is asked for a fault says so

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # http.server's

        def _answer(self, body: bytes, fault: Fault | None) -> None:
            if isinstance(fault, Answer):
                text = (
                    f"<Error><Code>{fault.code}</Code><Message>{fault.code}, by the proxy"
                    "</Message></Error>"
                )
                self._send(fault.status, [("Content-Type", "application/xml")], text.encode())
                return
            if fault == "hang":
                proxy.closing.wait(60)
                self._reset()
                return
            if fault == "reset":
                self._reset()
                return
            if fault == "alter body":
                body = altered(body)
            address = urlsplit(proxy.target)
            server = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            if fault == "reset after":
                self._reset()
                return
            if fault == "alter answer":
                content = altered(content)
            self._send(answer.status, answer.getheaders(), content, cut=fault == "cut answer")

        def _send(
            self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            sized = False
            for name, value in headers:
                if name.lower() in ("connection", "transfer-encoding"):
                    continue
                sized |= name.lower() == "content-length"
                self.send_header(name, value)
            if not sized:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._reset()

        def _reset(self) -> None:
            """Ends the connection by RST, as a machine that goes down does."""
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that are killed

    server = Server(("127.0.0.1", 0), Handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()


def altered(content: bytes) -> bytes:
    """With one bit turned in the middle."""
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)
