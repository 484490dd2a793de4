from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from s3fs import S3FileSystem

import storage.retry
from storage.errors import StoreError
from storage.retry import Patience
from storage.s3 import _PART
from storage.store import StoreOptions, open_store
from tests.faults.proxy import proxying
from tests.s3 import _free_port
from tests.storage.contract import StoreContract


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, s3_url):
        return open_store(s3_url)

    @pytest.fixture
    def again(self, store):
        return lambda: open_store(store.url + "/")


def test_prefixes_of_one_bucket_do_not_see_each_other(s3_url):
    store, beside = open_store(s3_url), open_store(s3_url + "2")
    store.write("key", b"1")
    assert list(beside.keys("")) == []
    assert list(open_store(s3_url.rsplit("/", 1)[0]).keys(s3_url.rsplit("/", 1)[1])) == [
        f"{s3_url.rsplit('/', 1)[1]}/key"
    ]


def test_a_listing_goes_past_its_first_page(s3_url, monkeypatch):
    store = open_store(s3_url)
    for i in range(5):
        store.write(f"k/{i}", b"")
    call = store._files.call_s3

    def small_pages(method, **arguments):
        if method == "list_objects_v2":
            arguments["MaxKeys"] = 2
        return call(method, **arguments)

    monkeypatch.setattr(store._files, "call_s3", small_pages)
    assert list(store.keys("k")) == [f"k/{i}" for i in range(5)]


def test_a_body_of_exactly_one_part(s3_url):
    store = open_store(s3_url)
    store.write("key", bytes(_PART))
    with store.read("key") as body:
        assert len(body.read()) == _PART


def test_an_endpoint_that_is_no_url_is_told(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StoreError, match=r"localhost:9000; an endpoint is written http://"):
        open_store("s3://bucket/x", StoreOptions(endpoint="localhost:9000"))


def test_an_upload_that_somebody_ended_is_told_as_that(s3_url):
    store = open_store(s3_url)

    class Ended(io.BytesIO):
        """After its first part somebody ends what is under way."""

        def read(self, size=-1):
            for upload in store.unfinished(""):
                store.discard(upload)
            return super().read(size)

    with pytest.raises(StoreError, match="/key: its upload was ended by somebody else"):
        store.write("key", Ended(bytes(3 * _PART)))
    assert list(store.keys("")) == []


@pytest.mark.parametrize(("size", "requests"), [(0, 1), (99, 1), (100, 1), (101, 2), (1000, 2)])
def test_a_small_object_takes_one_request(s3_url, monkeypatch, size, requests):
    monkeypatch.setattr("storage.s3._SMALL", 100)
    store = open_store(s3_url)
    body = bytes(range(250)) * 4
    store.write("key", body[:size])
    sent = []
    call = store._files._call_s3
    monkeypatch.setattr(
        store._files, "_call_s3", lambda *given, **more: sent.append(given) or call(*given, **more)
    )
    with store.read("key") as stream:
        assert stream.read() == body[:size]
    assert len(sent) == requests


def test_a_large_object_takes_few_requests(s3_url, monkeypatch):
    monkeypatch.setattr("storage.s3._SMALL", 100)
    monkeypatch.setattr("storage.s3._WHOLE", 1000)
    monkeypatch.setattr("storage.s3._PIECE", 10_000)
    store = open_store(s3_url)
    body = bytes(range(250)) * 200
    store.write("key", body)
    sent = []
    read_into = store.read_into
    monkeypatch.setattr(store, "read_into", lambda *given: sent.append(given) or read_into(*given))
    with store.read("key") as stream:
        assert stream.read() == body
    assert len(sent) == 5
    with store.read("key") as stream:
        assert b"".join(iter(lambda: stream.read(100), b"")) == body
    assert len(sent) == 11  # the last one finds the end


def test_the_endpoint_may_come_from_the_options(s3_url, s3_server, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    store = open_store(s3_url, StoreOptions(endpoint=s3_server.endpoint, region="eu-west-1"))
    store.write("key", b"1")
    assert list(store.keys("")) == ["key"]


def test_optional_checksums_can_be_asked_for(s3_url):
    store = open_store(s3_url, StoreOptions(checksum="when_supported"))
    store.write("key", b"123")
    with store.read("key") as body:
        assert body.read() == b"123"


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_told_at_opening(s3_url, name, monkeypatch):
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(StoreError, match="refuses the AWS credentials") as error:
        open_store(s3_url)
    assert str(error.value).startswith(s3_url)
    assert "\n" not in str(error.value)


def test_no_key_is_told_at_opening(s3_url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no AWS credentials; set AWS_ACCESS_KEY_ID"):
        open_store(s3_url)


def test_an_unreachable_endpoint_is_told_at_opening(s3_url):
    endpoint = f"http://127.0.0.1:{_free_port()}"
    with pytest.raises(StoreError, match=endpoint) as error:
        open_store(s3_url, StoreOptions(endpoint=endpoint))
    assert "check the endpoint" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def outage(monkeypatch):
    """Begins one that lasts for some seconds of a clock on which nothing but waiting takes time."""
    slept = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept))
    never = SimpleNamespace(wait=slept.append, is_set=lambda: False)
    call = S3FileSystem.call_s3

    def begin(seconds):
        def answer(*arguments, **more):
            if sum(slept) < seconds:
                raise ConnectionResetError("reset by the server")
            return call(*arguments, **more)

        monkeypatch.setattr(storage.retry, "time", clock)
        monkeypatch.setattr(storage.retry, "_hurried", never)
        monkeypatch.setattr(S3FileSystem, "call_s3", answer)

    return begin


def test_a_running_job_outlasts_minutes_without_the_store(s3_url, outage):
    store = open_store(s3_url)
    outage(270)
    store.write("key", b"123")
    assert list(store.keys("")) == ["key"]


def test_a_worker_that_starts_again_waits_for_the_store_and_a_person_does_not(s3_url, outage):
    outage(270)
    with pytest.raises(StoreError, match="does not answer as it should"):
        open_store(s3_url)
    assert list(open_store(s3_url, patient=True).keys("")) == []


def test_a_store_that_stays_away_is_told_in_the_end(s3_url, outage):
    outage(9999)
    with pytest.raises(StoreError, match="does not answer as it should"):
        open_store(s3_url, patient=True)


def test_a_bucket_that_does_not_exist_is_told_at_opening(s3_url):
    with pytest.raises(StoreError, match="bucket nowhere does not exist"):
        open_store("s3://nowhere/prefix")


def test_a_bucket_that_a_server_lists_as_empty_is_told_at_the_first_write(s3_url):
    with pytest.raises(StoreError, match="bucket nowhere does not exist"):
        open_store("s3://nowhere/prefix").write("key", b"body")


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "s3://bucket/a?b", "s3://bucket/a//b"])
def test_malformed_urls_are_refused(url):
    with pytest.raises(StoreError, match=r"s3://bucket/prefix|not a key"):
        open_store(url)


@pytest.mark.parametrize("size", [3, 2 * _PART], ids=["an object", "a part"])
def test_a_server_that_takes_nothing_of_a_body_is_told_in_the_end(
    s3_url, s3_server, monkeypatch, size
):
    monkeypatch.setattr("storage.s3._PATIENCE", Patience(2, 0.0))
    monkeypatch.setattr("storage.s3._SLOWEST", 2**25)
    with proxying(s3_server.endpoint) as proxy:
        store = open_store(s3_url, StoreOptions(endpoint=proxy.endpoint, timeout=0.5))
        proxy.rule = lambda request: "stall" if request.method == "PUT" else None
        with pytest.raises(StoreError, match=r"key: .* did not take [\d,]+ bytes within 1 s"):
            store.write("key", bytes(size))
        assert max(request.number for request, _ in proxy.broken) == 1
        proxy.rule = lambda request: None
        assert list(store.keys("")) == list(store.unfinished("")) == []
