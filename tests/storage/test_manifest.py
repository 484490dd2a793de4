from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import DamagedError, MissingKey, StoreError
from storage.garbage import discard, find_garbage
from storage.manifest import (
    FileEntry,
    Manifest,
    fetch,
    publish,
    publish_once,
    published,
    read_bytes,
    read_json,
    verify,
    withdraw,
)
from storage.store import open_store

FILES = {"a.json": b'{"x": [1, 2]}', "deep/er/b.bin": b"\x00" * 100, "c": b""}


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def any_store(request):
    """The same behaviour on a folder and on a real S3 server."""
    return open_store(request.getfixturevalue(request.param))


@pytest.fixture
def folder_url(tmp_path):
    return str(tmp_path / "store")


on_both = pytest.mark.parametrize("any_store", ["folder_url", "s3_url"], indirect=True)


@on_both
def test_fetches_what_was_published(any_store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    sent = publish(any_store, "p/q", {**FILES, "file": source, "made": lambda: b"late"}, {"n": 3})
    assert published(any_store, "p/q") == sent
    got = fetch(any_store, "p/q", tmp_path / "copy")
    assert got == sent
    assert (tmp_path / "copy/file").read_bytes() == b"from a file"
    assert (tmp_path / "copy/made").read_bytes() == b"late"
    assert (tmp_path / "copy/deep/er/b.bin").read_bytes() == FILES["deep/er/b.bin"]
    assert read_json(any_store, "p/q", "a.json") == {"x": [1, 2]}
    assert {path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()} == {
        "a.json", "b.bin", "c", "file", "made",
    }  # fmt: skip


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.dictionaries(st.from_regex(r"[a-z]{1,4}\.[a-z]{1,3}", fullmatch=True), st.binary()),
    meta=st.dictionaries(
        st.text(max_size=5),
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5)
        | st.floats(allow_nan=False, allow_infinity=False),
    ),
)  # fmt: skip
def test_any_files_and_facts_come_back(store, files, meta):
    publish(store, "p", files, meta)
    manifest = published(store, "p")
    assert manifest is not None
    assert manifest.meta == meta
    assert {name: read_bytes(store, "p", name) for name in manifest.files} == files
    assert set(store.keys("p")) == {f"p/{name}" for name in [*files, "manifest.json"]}


def test_nothing_published_is_none(store):
    assert published(store, "p") is None
    with pytest.raises(MissingKey, match="nothing is published there"):
        fetch(store, "p", store)
    with pytest.raises(MissingKey, match="nothing is published there"):
        read_bytes(store, "p", "a")


def test_a_body_that_fails_publishes_nothing(store):
    def fail():
        raise RuntimeError("no body")

    publish(store, "p", {"a": b"old"})
    with pytest.raises(RuntimeError, match="no body"):
        publish(store, "p", {"a": b"new", "b": fail})
    assert published(store, "p") is None


@on_both
def test_a_kill_between_files_and_manifest_publishes_nothing(any_store, tmp_path):
    program = f"""
import os, signal, sys
from storage.manifest import publish
from storage.store import open_store
store = open_store({any_store.url!r})
write = store.write
def until_manifest(key, body):
    if key.endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(key, body)
store.write = until_manifest
publish(store, "p", {{"a": b"1", "b": b"2"}})
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert list(any_store.keys("")) == ["p/a", "p/b"]
    assert published(any_store, "p") is None
    publish(any_store, "p", {"a": b"1", "b": b"2"})
    assert read_bytes(any_store, "p", "b") == b"2"


def test_publishing_again_removes_the_files_that_are_gone(store):
    publish(store, "p", {"a": b"1", "b": b"2"})
    publish(store, "p/nested", {"x": b"3"})
    publish(store, "p", {"b": b"4", "c": b"5"})
    assert list(store.keys("p")) == [
        "p/b", "p/c", "p/manifest.json", "p/nested/manifest.json", "p/nested/x",
    ]  # fmt: skip


def test_withdrawing_takes_everything_below(store):
    publish(store, "p", {"a": b"1"})
    publish(store, "p/nested", {"x": b"3"})
    publish(store, "pq", {"a": b"1"})
    withdraw(store, "p")
    withdraw(store, "p")
    assert list(store.keys("")) == ["pq/a", "pq/manifest.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s.write("p/deep/er/b.bin", b"\x00" * 99), "99 bytes, but 100 were published"),
        (lambda s: s.write("p/deep/er/b.bin", b"\x01" * 100), "another digest"),
        (lambda s: s.remove("p/deep/er/b.bin"), "no longer there"),
    ],
)
@on_both
def test_a_damaged_object_is_named(any_store, tmp_path, damage, words):
    publish(any_store, "p", FILES)
    damage(any_store)
    for act in (
        lambda: fetch(any_store, "p", tmp_path / "copy"),
        lambda: read_bytes(any_store, "p", "deep/er/b.bin"),
    ):
        with pytest.raises(DamagedError, match=words) as error:
            act()
        assert str(error.value).startswith(f"{any_store.url}/p/deep/er/b.bin: ")
        assert "run the stage that writes it again" in str(error.value)
    assert list((tmp_path / "copy/deep/er").iterdir()) == []


def test_fetching_again_brings_only_what_differs(store, tmp_path, monkeypatch):
    publish(store, "p", FILES)
    copy = tmp_path / "copy"
    manifest = fetch(store, "p", copy)
    (copy / "a.json").write_bytes(b"edited")
    read = []
    original = store.read
    monkeypatch.setattr(store, "read", lambda key: read.append(key) or original(key))
    fetch(store, "p", copy, manifest)
    assert read == ["p/a.json"]
    assert (copy / "a.json").read_bytes() == FILES["a.json"]


@pytest.mark.parametrize("name", ["manifest.json", "../out", "/abs", "a//b", ""])
def test_names_that_could_leave_the_prefix_are_refused(store, name):
    with pytest.raises(StoreError, match="not a key"):
        publish(store, "p", {name: b"1"})
    assert list(store.keys("")) == []


def test_a_manifest_from_elsewhere_cannot_write_outside(store, tmp_path):
    entry = {"size": 1, "sha256": "0" * 64}
    store.write("p/manifest.json", json.dumps({"files": {"../out": entry}}).encode())
    with pytest.raises(DamagedError, match=r"p/manifest.json: not a manifest"):
        fetch(store, "p", tmp_path / "copy")


def test_a_manifest_with_a_file_that_nothing_vouches_for_is_named(store):
    store.write("p/manifest.json", json.dumps({"files": {"a": {"size": 1}}}).encode())
    with pytest.raises(DamagedError, match=r"p/manifest.json: not a manifest .*without a digest"):
        published(store, "p")


def test_a_damaged_manifest_is_named_and_can_be_published_over(store):
    publish(store, "p", {"a": b"1"})
    store.write("p/manifest.json", b'{"files": {')
    with pytest.raises(DamagedError, match=r"p/manifest.json: not a manifest") as error:
        published(store, "p")
    assert "\n" not in str(error.value)
    publish(store, "p", {"a": b"2"})
    assert read_bytes(store, "p", "a") == b"2"


def test_a_manifest_of_which_one_digit_differs_is_named(store):
    publish(store, "p", {"a": b"1"}, {"loss": 0.125})
    with store.read("p/manifest.json") as stream:
        text = stream.read()
    store.write("p/manifest.json", text.replace(b"0.125", b"0.175"))
    with pytest.raises(DamagedError, match=r"p/manifest.json: not what was written"):
        published(store, "p")


def test_nan_is_refused_before_anything_is_written(store):
    with pytest.raises(ValueError, match="JSON"):
        publish(store, "p", {"a": b"1"}, {"loss": float("nan")})
    assert list(store.keys("")) == []


def test_bad_json_is_damage(store):
    publish(store, "p", {"a.json": b"{"})
    with pytest.raises(DamagedError, match=r"p/a.json: not JSON"):
        read_json(store, "p", "a.json")


def test_a_name_that_was_not_published_is_missing(store):
    publish(store, "p", {"a": b"1"})
    store.write("p/stray", b"1")
    with pytest.raises(MissingKey, match="not among the published files"):
        read_bytes(store, "p", "stray")


def test_manifests_of_the_first_version_stay_readable():
    old = (
        '{"files":{"a":{"size":1,"sha256":'
        '"6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"}},'
        '"meta":{"loss":0.5}}'
    )
    manifest = Manifest.model_validate_json(old)
    assert manifest.files["a"].size == 1
    assert manifest.model_dump_json() == old


PLACE = "library/t/d"


class Meanwhile:
    """A store in which something happens once, before or after a key is written."""

    def __init__(self, store, ending, act, before):
        self._store, self._ending, self._act, self._before = store, ending, act, before

    def __getattr__(self, name):
        return getattr(self._store, name)

    def _happens(self, key, now):
        if self._act is not None and key.endswith(self._ending) and now == self._before:
            act, self._act = self._act, None
            act()

    def write(self, key, body):
        self._happens(key, True)
        self._store.write(key, body)
        self._happens(key, False)


@on_both
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("ending", ["a.json", "manifest.json"])
def test_of_several_that_publish_once_at_the_same_time_one_is_whole(any_store, ending, before):
    theirs = {"a.json": b"[2]", "c": b"as long as you like"}
    found = []

    def they():
        found.append(publish_once(any_store, PLACE, theirs, {"by": "them"}))

    meanwhile = Meanwhile(any_store, ending, they, before)
    found.append(publish_once(meanwhile, PLACE, FILES, {"by": "us"}))
    manifest = verify(any_store, PLACE)
    assert manifest == published(any_store, PLACE)
    assert manifest in found
    # Whoever has read the other manifest before still finds what it said.
    for said in found:
        for name, content in (FILES if said.meta["by"] == "us" else theirs).items():
            assert read_bytes(any_store, PLACE, name, said) == content
    # Later ones leave it.
    assert publish_once(any_store, PLACE, {"c": b"too late"}) == manifest
    # What is left of the others is garbage, and nothing else.
    for garbage in find_garbage(any_store, 0):
        discard(any_store, garbage)
    assert verify(any_store, PLACE) == manifest


def test_a_file_lies_nowhere_else(store):
    for at in ("../q/c", "/c", "manifest.json"):
        with pytest.raises(ValidationError):
            FileEntry(size=0, sha256="0" * 64, at=at)
