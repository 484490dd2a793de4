"""Checkpoints and models on a real S3 server behind a proxy that breaks requests, saved by real
processes: each ends with nothing lost and nothing half-published."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from storage.checkpoint import Saver, latest_checkpoint
from storage.errors import StoreError
from storage.manifest import verify
from storage.registry import best, entries
from storage.retry import Patience
from storage.store import Store, StoreOptions, open_store
from tests.faults.conftest import Row
from tests.faults.proxy import Answer, Fault, Proxy, Request, altered
from tests.s3 import S3Server

pytestmark = pytest.mark.faults

ELEMENTS = 12 * 2**20
"""Of a tensor of 48 MiB: it goes out in several parts and comes back in several ranges."""
OPTIONS = StoreOptions(timeout=2)

SAVE = """
import sys
import torch
from storage.checkpoint import Saver
from storage.store import StoreOptions, open_store
url, token, first, last = sys.argv[1:]
store = open_store(url, StoreOptions(timeout=2))
saver = Saver(store, "run", token=token, keep=2)
for step in range(int(first), int(last) + 1):
    saver.save(step, {"w": torch.full((12 * 2**20,), float(step))}, {"step": step})
    saver.finish()
    print(step, flush=True)
"""

PUBLISH = """
import sys
from storage.manifest import publish
from storage.registry import Entry, add
from storage.store import StoreOptions, open_store
url, who, count = sys.argv[1:]
store = open_store(url, StoreOptions(timeout=2))
for i in range(int(count)):
    model = f"models/10B/{who}-{i}"
    publish(store, model, {"a": who.encode() * 1000, "b": bytes(20 * 2**20)})
    add(store, Entry(budget="10B", plan_digest=f"{who}-{i}", teacher="t", sweep=who, prefix="s",
                     model=model, parameters=1, fidelity_loss=1 / (1 + i)))
    print(i, flush=True)
"""


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


def run(program: str, *arguments: object) -> tuple[int, str, str]:
    with running(program, *arguments) as process:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err


def save(url: str, token: str, first: int, last: int) -> None:
    """What the program SAVE does, without starting a process."""
    saver = Saver(open_store(url, OPTIONS), "run", token=token, keep=2)
    for step in range(first, last + 1):
        saver.save(step, {"w": torch.full((ELEMENTS,), float(step))}, {"step": step})
        saver.finish()


@pytest.fixture
def direct(proxy: Proxy, s3_server: S3Server, s3_url: str) -> Store:
    """The same store, past the proxy."""
    return open_store(s3_url, StoreOptions(endpoint=s3_server.endpoint))


def loaded(store: Store) -> tuple[int, float] | None:
    """Step and content of the newest whole checkpoint."""
    weights = torch.zeros(ELEMENTS)
    found = latest_checkpoint(store, "run", lambda c: c.tensors.fill({"w": weights}))
    if found is None:
        return None
    assert found.state == {"step": found.step}
    assert torch.equal(weights, torch.full_like(weights, weights[0].item()))
    return found.step, weights[0].item()


def everything_is_published(store: Store) -> None:
    """Every object belongs to something published, and no upload is left open."""
    keys = set(store.keys(""))
    held: set[str] = {key for key in keys if key.startswith("registry/")}
    for key in keys:
        prefix, _, name = key.rpartition("/")
        if name == "manifest.json":
            manifest = verify(store, prefix)
            held |= {key, *(f"{prefix}/{file}" for file in manifest.stored)}
    assert keys == held
    assert list(store.unfinished("")) == []


def test_killed_in_an_upload(proxy: Proxy, direct: Store, s3_url: str, row: Row) -> None:
    save(s3_url, "one", 1, 2)
    reached = threading.Event()

    def rule(request: Request) -> Fault | None:
        if request.is_part and "step-000000003" in request.path and "partNumber=2" in request.path:
            reached.set()
            return "hang"
        return None

    proxy.rule = rule
    with running(SAVE, s3_url, "two", 3, 3) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert loaded(direct) == (2, 2.0)
    assert [upload.key for upload in direct.unfinished("run")] != []
    proxy.rule = lambda request: None
    save(s3_url, "three", 3, 3)
    assert loaded(direct) == (3, 3.0)
    everything_is_published(direct)
    row("SIGKILL in an upload", "continued from the checkpoint before; its open parts were ended")


@pytest.mark.parametrize("file", [".json", "index.json", "state.json", "manifest.json"])
def test_killed_between_files_and_manifest(
    proxy: Proxy, direct: Store, s3_url: str, row: Row, file: str
) -> None:
    save(s3_url, "one", 1, 1)
    reached = threading.Event()

    def rule(request: Request) -> Fault | None:
        if request.method == "PUT" and "step-000000002" in request.path:
            name = request.path.split("?")[0]
            if name.endswith(file) and (file != ".json" or "-rank-" in name):
                reached.set()
                return "hang"
        return None

    proxy.rule = rule
    with running(SAVE, s3_url, "two", 2, 2) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert loaded(direct) == (1, 1.0)
    proxy.rule = lambda request: None
    save(s3_url, "three", 2, 2)
    assert loaded(direct) == (2, 2.0)
    everything_is_published(direct)
    said = "a rank's part" if file == ".json" else file
    row(f"SIGKILL before {said} is written", "continued from the checkpoint before")


@pytest.mark.parametrize("where", ["/b?", "manifest.json", "/registry/"])
def test_killed_in_a_publication(
    proxy: Proxy, direct: Store, s3_url: str, row: Row, where: str
) -> None:
    assert run(PUBLISH, s3_url, "old", 1)[0] == 0
    reached = threading.Event()

    def rule(request: Request) -> Fault | None:
        if request.method == "PUT" and where in request.path:
            reached.set()
            return "hang"
        return None

    proxy.rule = rule
    with running(PUBLISH, s3_url, "new", 2) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    leader = best(direct, "10B")
    assert leader is not None
    assert leader.model == "models/10B/old-0"
    verify(direct, leader.model)
    proxy.rule = lambda request: None
    assert run(PUBLISH, s3_url, "new", 2)[0] == 0
    for upload in direct.unfinished(""):
        direct.discard(upload)
    leader = best(direct, "10B")
    assert leader is not None
    assert leader.model == "models/10B/new-1"
    assert len(entries(direct)) == 3
    everything_is_published(direct)
    said = {"/b?": "a file", "manifest.json": "the manifest", "/registry/": "the entry"}[where]
    row(f"SIGKILL in a publication, at {said}", "the best stayed the one before; published again")


PASSING: dict[str, Fault] = {
    "500 InternalError": Answer(500, "InternalError"),
    "503 SlowDown": Answer(503, "SlowDown"),
    "503 without S3's answer": Answer(503, ""),
    "no answer within the timeout": "hang",
    "nothing taken of a body": "stall",
    "connection reset": "reset",
    "connection reset after the work was done": "reset after",
    "answer cut short": "cut answer",
    "answer altered on its way back": "alter answer",
}


@pytest.mark.parametrize("name", PASSING)
def test_a_store_that_fails_now_and_then(
    proxy: Proxy,
    direct: Store,
    s3_url: str,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The first try of every third request, and of every completion of an upload."""
    fault, count = PASSING[name], 0
    monkeypatch.setattr("storage.s3._SLOWEST", 2**24)  # a second for a part

    def rule(request: Request) -> Fault | None:
        nonlocal count
        if request.number or "run/" not in request.path:
            return None
        if fault == "alter answer":
            return fault if request.range else None
        if fault == "cut answer" and request.method != "GET":
            return None
        if fault == "stall" and request.method != "PUT":
            return None
        count += 1
        completes = request.method == "POST" and "uploadId=" in request.path
        return fault if count % 3 == 0 or completes else None

    proxy.rule = rule
    save(s3_url, "one", 1, 2)
    through = open_store(s3_url, OPTIONS)
    assert loaded(through) == (2, 2.0)
    assert loaded(direct) == (2, 2.0)
    assert proxy.broken
    proxy.rule = lambda request: None
    Saver(direct, "run", keep=2)  # ends uploads of which the answer to their beginning was lost
    everything_is_published(direct)
    row(name, f"{len(proxy.broken)} requests failed and were tried again")


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("503 for good", Answer(503, "SlowDown"), "does not answer as it should"),
        ("credentials that expire", Answer(400, "ExpiredToken"), "refuses the AWS credentials"),
        ("access taken away", Answer(403, "AccessDenied"), "refuses the AWS credentials"),
        ("clocks that differ", Answer(403, "RequestTimeTooSkewed"), "the clocks differ"),
    ],
)
def test_a_store_that_fails_for_good(
    proxy: Proxy,
    direct: Store,
    s3_url: str,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Answer,
    words: str,
) -> None:
    monkeypatch.setattr("storage.s3._PATIENCE", Patience(4, 0.0))  # not for minutes
    save(s3_url, "one", 1, 2)
    proxy.rule = lambda request: fault if request.is_part else None
    with pytest.raises(StoreError, match=words) as raised:
        save(s3_url, "two", 3, 4)
    assert str(raised.value).startswith("s3://")
    assert "\n" not in str(raised.value)
    tries = max(request.number for request, _ in proxy.broken)
    assert (tries > 2) == (fault.status == 503 or fault.code == "RequestTimeTooSkewed")
    assert loaded(direct) == (2, 2.0)
    proxy.rule = lambda request: None
    save(s3_url, "three", 3, 4)
    assert loaded(direct) == (4, 4.0)
    everything_is_published(direct)
    row(name, "told in one sentence; continued from the checkpoint before")


DAMAGES = {
    "an object cut short": lambda content: content[:-100],
    "an object altered": altered,
    "an object emptied": lambda content: b"",
    "an object gone": None,
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("part", [".safetensors", "index.json", "state.json", "manifest.json"])
def test_a_damaged_object(
    direct: Store, s3_url: str, row: Row, caplog: pytest.LogCaptureFixture, name: str, part: str
) -> None:
    save(s3_url, "one", 1, 2)
    key = next(k for k in direct.keys("run/step-000000002") if k.endswith(part))
    damage = DAMAGES[name]
    if damage is None:
        direct.remove(key)
    else:
        content = direct.read(key).read()
        direct.write(key, damage(content))
    assert loaded(direct) == (1, 1.0)
    if part != "manifest.json" or damage is not None:
        assert "run/step-000000002" in caplog.text
        assert part in caplog.text
    save(s3_url, "two", 2, 3)
    assert loaded(direct) == (3, 3.0)
    refused = (
        "does not count" if part == "manifest.json" and damage is None else "named and refused"
    )
    row(f"{name}: {part}", f"{refused}; continued from the checkpoint before")


def test_a_server_that_always_alters_one_object(
    proxy: Proxy, direct: Store, s3_url: str, row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    save(s3_url, "one", 1, 2)
    proxy.rule = lambda request: (
        "alter answer" if request.range and "one-2-rank-00000.safetensors" in request.path else None
    )
    assert loaded(open_store(s3_url, OPTIONS)) == (1, 1.0)
    assert "are not what was published" in caplog.text
    row("wrong checksums at every read", "read again, named and refused; the one before was used")


def test_a_body_altered_on_its_way_to_a_server_that_does_not_look(
    proxy: Proxy, direct: Store, s3_url: str, row: Row, caplog: pytest.LogCaptureFixture
) -> None:
    """S3 itself refuses such a part, since the signature covers the body; this server takes it."""
    proxy.rule = lambda request: (
        "alter body" if request.is_part and "step-000000002" in request.path else None
    )
    save(s3_url, "one", 1, 2)
    assert loaded(direct) == (1, 1.0)
    assert "are not what was published" in caplog.text
    row("a body altered on its way out", "named and refused at reading; the one before was used")


def test_no_room_to_stage(direct: Store, s3_url: str, row: Row) -> None:
    limited = (
        "import resource, storage.checkpoint\n"
        "storage.checkpoint._IN_MEMORY = 0\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    )
    code, _, err = run(limited + SAVE, s3_url, "one", 1, 2)
    assert code == 0, err
    assert "no room to stage a checkpoint" in err
    assert loaded(direct) == (2, 2.0)
    everything_is_published(direct)
    row("full local disk, staging", "sent straight from the tensors, training waited; warned")


def test_no_room_in_a_folder_store(tmp_path: Path, row: Row) -> None:
    url = str(tmp_path / "store")
    save(url, "one", 1, 2)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    code, _, err = run(limit + SAVE, url, "two", 3, 3)
    assert code != 0
    assert "check the folder's rights and free space" in err.strip().splitlines()[-1]
    store = open_store(url)
    assert loaded(store) == (2, 2.0)
    save(url, "three", 3, 3)
    assert loaded(store) == (3, 3.0)
    everything_is_published(store)
    row("full local disk, store in a folder", "told in one sentence; the checkpoint before stayed")


def test_sweeps_that_publish_at_once_to_a_failing_store(
    proxy: Proxy, direct: Store, s3_url: str, row: Row
) -> None:
    count = 0

    def rule(request: Request) -> Fault | None:
        nonlocal count
        count += 1
        return Answer(503, "SlowDown") if count % 7 == 0 else None

    proxy.rule = rule
    with running(PUBLISH, s3_url, "one", 4) as one, running(PUBLISH, s3_url, "two", 4) as two:
        for process in (one, two):
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
    found = entries(direct)
    assert len(found) == 8
    for entry in found:
        assert entry.model is not None
        verify(direct, entry.model)
    leader = best(direct, "10B")
    assert leader is not None
    assert leader.fidelity_loss == 0.25
    everything_is_published(direct)
    row("two sweeps publishing at once", "all 8 models and entries are there, and the best is")


SKEWED = """
import datetime, os
import storage.registry
shift = datetime.timedelta(hours=int(os.environ["SKEW_HOURS"]))
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + shift
storage.registry.datetime = Shifted
"""


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_machine_whose_clock_is_wrong(
    direct: Store, s3_url: str, row: Row, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Nothing is decided by a client's clock: the best is the best, whoever says when."""
    monkeypatch.setenv("SKEW_HOURS", str(hours))
    assert run(PUBLISH, s3_url, "right", 1)[0] == 0
    code, _, err = run(SKEWED + PUBLISH, s3_url, "wrong", 2)
    assert code == 0, err
    assert run(PUBLISH, s3_url, "right", 3)[0] == 0
    leader = best(direct, "10B")
    assert leader is not None
    assert leader.model == "models/10B/right-2"
    created = [entry.created for entry in entries(direct) if entry.sweep == "wrong"]
    moments = [entry.created for entry in entries(direct) if entry.sweep == "right"]
    assert abs((created[0] - moments[0]).total_seconds()) > 4 * 3600
    # What is young is so by the store's clock.
    assert all(body.seconds < 600 for body in direct.listing("best"))
    row(f"a clock {hours:+d} h off", "the same best; ages are the store's own")
