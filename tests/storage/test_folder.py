from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from storage.errors import StoreError
from storage.store import open_store
from tests.storage.contract import StoreContract


class TestFolderStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(str(tmp_path / "runs"))

    @pytest.fixture
    def again(self, store):
        return lambda: open_store(f"file://{store.url}")


def test_opening_makes_no_folder(tmp_path):
    open_store(str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("runs").url == str(tmp_path / "runs")


def test_a_file_url_is_unquoted(tmp_path):
    assert open_store(f"file://{tmp_path}/two%20words").url == f"{tmp_path}/two words"


@pytest.mark.parametrize("url", ["", "gs://bucket", "file://host/path", "http://a/b"])
def test_other_urls_are_refused(url):
    with pytest.raises(StoreError, match="file:///"):
        open_store(url)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file; give a folder"):
        open_store(str(tmp_path / "file" / "runs"))


def test_removing_the_last_key_leaves_no_empty_folders(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a/b/c", b"")
    store.remove("a/b/c")
    assert [path.name for path in tmp_path.iterdir()] == [".partial"]


def test_what_lies_below_a_key_is_absent(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a", b"")
    store.remove("a/below")
    assert list(store.keys("")) == ["a"]


def test_a_remover_beside_a_writer_loses_nothing(tmp_path):
    store = open_store(str(tmp_path))

    def come_and_go():
        for _ in range(50):
            store.write("a/b/other", b"")
            store.remove("a/b/other")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    for i in range(50):
        store.write(f"a/b/{i}", b"")
        store.remove(f"a/b/{i}")
    store.write("a/b/last", b"")
    thread.join()
    assert list(store.keys("")) == ["a/b/last"]


def test_a_killed_write_stores_nothing_and_is_cleared_away_later(tmp_path):
    program = f"""
import io, os, signal
from storage.store import open_store
class Killed(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 1 << 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(size)
open_store({str(tmp_path)!r}).write("key", Killed(bytes(4 << 20)))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert list(open_store(str(tmp_path)).keys("")) == []
    (left,) = (tmp_path / ".partial").iterdir()
    days_ago = time.time() - 3 * 24 * 3600
    os.utime(left, (days_ago, days_ago))
    open_store(str(tmp_path))
    assert list((tmp_path / ".partial").iterdir()) == []


def test_a_clock_that_is_ahead_takes_no_write_in_flight(tmp_path, monkeypatch):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "abc").write_bytes(b"half")
    ahead = time.time() + 3 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: ahead)
    open_store(str(tmp_path))
    assert [path.name for path in (tmp_path / ".partial").iterdir()] == ["abc"]


def test_unfinished_writes_are_no_keys(tmp_path):
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError, match="unfinished writes"):
        store.read(".partial/x")
