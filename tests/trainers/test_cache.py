"""Copies on a machine: whole, made once however many processes ask, and never half."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from storage.manifest import Manifest, publish
from storage.store import Store, open_store
from tests.faults.proxy import proxying
from tests.s3 import S3Server
from trainers import cache
from trainers.cache import CacheError, local_copy
from trainers.teacher import Teacher, open_teacher

FILES = {"a.bin": os.urandom(3 * 2**20), "part/b.bin": os.urandom(2**20), "part/c.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    publish(store, "some/thing", FILES)
    return store


def held(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_copy_is_whole_and_left_alone(store, tmp_path):
    folder = local_copy(store, "some/thing", cache=tmp_path / "cache")
    assert held(folder) == FILES
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert local_copy(store, "some/thing", cache=tmp_path / "cache") == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_copy_that_is_as_it_was_is_not_read_again(store, tmp_path, monkeypatch):
    folder = local_copy(store, "some/thing", cache=tmp_path / "cache")
    read: list[Path] = []
    looked = cache.is_copy
    monkeypatch.setattr(cache, "is_copy", lambda *asked: (read.append(asked[0]), looked(*asked))[1])
    assert local_copy(store, "some/thing", cache=tmp_path / "cache") == folder
    assert read == []
    publish(store, "some/thing", {**FILES, "a.bin": bytes(len(FILES["a.bin"]))})
    local_copy(store, "some/thing", cache=tmp_path / "cache")
    assert read == [folder]
    assert not any(held(folder)["a.bin"])


def test_what_was_altered_or_left_half_is_made_good(store, tmp_path):
    folder = local_copy(store, "some/thing", cache=tmp_path / "cache")
    (folder / "a.bin").write_bytes(bytes(len(FILES["a.bin"])))
    (folder / "part" / ".b.bin.x1y2").write_bytes(b"a fetch that was killed")
    assert held(local_copy(store, "some/thing", cache=tmp_path / "cache")) == FILES


def test_without_room_it_says_where_and_how_much(store, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("trainers.cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CacheError, match=r"cache.*some/thing.*0\.0 GiB are free.*XDG_CACHE_HOME"):
        local_copy(store, "some/thing", cache=tmp_path / "cache")


def test_where_there_is_no_room_what_was_long_unused_gives_way(store, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    old, older, fresh = (f"other/{name}" for name in ("old", "older", "fresh"))
    folders = {}
    for prefix, days in ((old, 8), (older, 9), (fresh, 6)):
        publish(store, prefix, {"a.bin": os.urandom(2**20)})
        folders[prefix] = local_copy(store, prefix, cache=root)
        (note,) = folders[prefix].parent.glob(f".{folders[prefix].name}.verified")
        used = time.time() - days * 24 * 3600
        os.utime(note, (used, used))

    def usage(_: Path) -> shutil._ntuple_diskusage:
        used = sum(file.stat().st_size for file in root.rglob("*.bin"))
        return shutil._ntuple_diskusage(6 * 2**20, used, 6 * 2**20 - used)

    monkeypatch.setattr("trainers.cache.shutil.disk_usage", usage)
    publish(store, "one/more", {"a.bin": os.urandom(4 * 2**20)})
    assert local_copy(store, "one/more", cache=root).is_dir()  # one MiB too large
    assert {prefix for prefix, folder in folders.items() if folder.exists()} == {old, fresh}
    local_copy(store, old, cache=root)  # which is used again by this
    with pytest.raises(CacheError, match="make room"):
        local_copy(store, "some/thing", cache=root)
    assert {prefix for prefix, folder in folders.items() if folder.exists()} == {old, fresh}


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match=r"some/thing cannot be copied there \(Not a directory\)"):
        local_copy(store, "some/thing", cache=tmp_path / "cache")


def load(name: str, together: Barrier, sums: SimpleQueue[float]) -> None:
    looked = cache.is_copy

    def look_together(folder: Path, manifest: Manifest) -> bool:
        found = looked(folder, manifest)
        cache.is_copy = looked
        together.wait(60)  # nobody begins before all have seen that it is not there
        return found

    teacher = open_teacher(name)
    cache.is_copy = look_together
    sums.put(sum(float(tensor.double().sum()) for tensor in teacher.transformer().parameters()))


@pytest.fixture
def published(
    tiny_pipeline: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The tiny pipeline's address in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {str(f.relative_to(tiny_pipeline)): f for f in tiny_pipeline.rglob("*") if f.is_file()}
    publish(open_store(s3_url), "best/tiny", files)
    return f"{s3_url}/best/tiny"


def test_processes_of_a_machine_fetch_a_teacher_once(
    teacher: Teacher, published: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    context = multiprocessing.get_context("spawn")
    together, sums = context.Barrier(3), context.SimpleQueue()
    with proxying(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        processes = [
            context.Process(target=load, args=(published, together, sums)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
        weights = "transformer/diffusion_pytorch_model.safetensors"
        gets = {key: n for key, n in proxy.seen.items() if key[0] == "GET" and weights in key[1]}
    assert list(gets.values()) == [1]
    expected = sum(float(t.double().sum()) for t in teacher.transformer().parameters())
    assert [sums.get() for _ in range(3)] == [expected] * 3


def test_without_room_for_a_teacher_each_process_reads_the_store(
    teacher: Teacher, published: str, monkeypatch: pytest.MonkeyPatch, caplog
):
    found = open_teacher(published)
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("trainers.cache.shutil.disk_usage", lambda _: usage)
    expected, model = teacher.transformer().state_dict(), found.transformer().state_dict()
    assert expected.keys() == model.keys()
    assert all(model[name].equal(tensor) for name, tensor in expected.items())
    assert f"every process reads {published}" in caplog.text


def test_a_fetch_under_way_does_not_change_what_a_teacher_is(published: str):
    found = open_teacher(published)
    found.transformer()
    (found.folder / "transformer" / ".diffusion_pytorch_model.safetensors.x1y2").write_bytes(b"ab")
    again = open_teacher(published)
    assert (again.digest, again.encoder_digest) == (found.digest, found.encoder_digest)


def test_a_copy_that_a_neighbour_is_still_filling_is_not_taken_for_whole(
    teacher: Teacher, published: str, monkeypatch: pytest.MonkeyPatch
):
    found = open_teacher(published)
    shutil.rmtree(found.found / "vae")
    monkeypatch.setattr("trainers.teacher._whole_here", {})  # as in a process that did not open it
    assert found.vae().state_dict().keys() == teacher.vae().state_dict().keys()
