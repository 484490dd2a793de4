"""Leases, on a folder and on a real S3 server, held by processes that are killed."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest

from storage import lease
from storage.lease import Holder, LeaseError, holding, this_process
from storage.store import open_store

HOLD = """
import sys
from storage.lease import holding
from storage.store import open_store
with holding(open_store(sys.argv[1]), "leases", "sweep x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(
        str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def other(store):
    """Another process that holds it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.2)
    monkeypatch.setattr(lease, "STALE", 3.0)
    monkeypatch.setattr(lease, "_LOOK", 0.05)


def elsewhere(**changes):
    return this_process().model_copy(update={"host": "elsewhere", **changes})


def put(store, holder):
    store.write("leases/other.json", holder.model_dump_json().encode())


def test_one_at_a_time_and_nothing_is_left(store, other):
    hold = holding(store, "leases", "sweep x")
    with pytest.raises(LeaseError, match=f"process {other.pid} on .* is running it"), hold:
        pytest.fail("held twice")
    assert len(list(store.keys("leases"))) == 1
    other.communicate()
    with holding(store, "leases", "sweep x"):
        assert len(list(store.keys("leases"))) == 1
    assert not list(store.keys("leases"))


def test_who_was_killed_on_this_machine_holds_nothing(store, other):
    other.kill()
    other.wait()
    assert list(store.keys("leases"))
    with holding(store, "leases", "sweep x"):
        assert len(list(store.keys("leases"))) == 1


def test_a_process_number_that_is_used_again_is_another_process(store):
    put(store, this_process().model_copy(update={"began": 1.0}))
    with holding(store, "leases", "sweep x"):
        pass


def test_who_was_lost_elsewhere_is_waited_for_until_it_is_stale(store, hasty, caplog):
    put(store, elsewhere())
    with holding(store, "leases", "sweep x"):
        assert "other.json" not in str(list(store.keys("leases")))
    assert "on elsewhere was running it" in caplog.text


def test_who_renews_elsewhere_keeps_it(store, hasty):
    ended = threading.Event()

    def renew():
        for renewals in itertools.count(1):
            if ended.wait(0.3):
                return
            put(store, elsewhere(process=12, renewals=renewals))

    put(store, elsewhere(process=12))
    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        hold = holding(store, "leases", "sweep x")
        with pytest.raises(LeaseError, match="process 12 on elsewhere"), hold:
            pytest.fail("held twice")
    finally:
        ended.set()
        renewing.join()


def test_a_holder_renews_and_stops_when_another_took_it_for_lost(store, hasty):
    def work():
        with holding(store, "leases", "sweep x"):
            (mine,) = store.keys("leases")
            store.remove(mine)
            threading.Event().wait(60)

    with pytest.raises(LeaseError, match="another has gone on with it"):
        work()


def test_a_holder_that_renews_stays(store, hasty):
    with holding(store, "leases", "sweep x"):
        (mine,) = store.keys("leases")
        while b'"renewals":3' not in store.read(mine).read():
            pass


def test_an_object_that_is_no_lease_holds_nothing(store):
    store.write("leases/other.json", b"{")
    with holding(store, "leases", "sweep x"):
        pass


def test_ctrl_c_stays_ctrl_c(store):
    with pytest.raises(KeyboardInterrupt), holding(store, "leases", "sweep x"):
        raise KeyboardInterrupt
    assert not list(store.keys("leases"))


def test_a_holder_says_who_it_is():
    mine = this_process()
    assert mine.here
    assert not mine.dead
    assert not Holder.model_validate(elsewhere().model_dump()).here
