"""What every store must do; a subclass supplies the `store` and `again` fixtures."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest

from storage.errors import MissingKey, StoreError
from storage.manifest import publish, published, read_bytes, withdraw
from storage.store import Store


class BreaksHalfway(io.RawIOBase):
    """A body of which `good` bytes can be read, then reading fails."""

    def __init__(self, good: int) -> None:
        self._left = good

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._left <= 0:
            raise RuntimeError("the source broke")
        size = self._left if size < 0 else min(size, self._left)
        self._left -= size
        return b"x" * size


def ranged(store: Store, key: str, start: int, end: int) -> bytes:
    content = bytearray(end - start)
    return bytes(content[: store.read_into(key, start, memoryview(content))])


class StoreContract:
    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def again(self) -> Callable[[], Store]:
        """Opens the same store once more."""
        raise NotImplementedError

    @pytest.mark.parametrize("body", [b"", b"x", bytes(range(256)) * 1000])
    def test_reads_what_was_written(self, store, body):
        store.write("a/b.bin", body)
        with store.read("a/b.bin") as stream:
            assert stream.read() == body

    def test_a_stream_is_stored_from_where_it_stands_and_left_open(self, store):
        stream = io.BytesIO(b"0123456789")
        stream.seek(4)
        store.write("key", stream)
        assert not stream.closed
        with store.read("key") as body:
            assert body.read() == b"456789"

    def test_a_body_can_be_sought(self, store):
        store.write("key", b"0123456789")
        with store.read("key") as body:
            assert body.seek(-3, io.SEEK_END) == 7
            assert body.read() == b"789"
            body.seek(2)
            assert body.read(3) == b"234"
            assert body.read(0) == b""

    def test_ranges_end_where_the_body_does(self, store):
        store.write("key", b"0123456789")
        assert ranged(store, "key", 2, 5) == b"234"
        assert ranged(store, "key", 4, 4) == b""
        assert ranged(store, "key", 8, 99) == b"89"
        assert ranged(store, "key", 50, 60) == b""
        with pytest.raises(MissingKey, match="nothing is stored there"):
            ranged(store, "other", 0, 1)

    def test_writing_again_replaces(self, store):
        store.write("key", b"a longer first body")
        store.write("key", b"second")
        with store.read("key") as body:
            assert body.read() == b"second"

    def test_an_absent_key_is_missing(self, store):
        store.write("a/b", b"")
        for key in ("c", "a", "a/b/c", "a/bb"):
            with pytest.raises(MissingKey, match=f"{key}: nothing is stored there"):
                store.read(key)

    def test_keys_are_sorted_and_count_whole_parts(self, store):
        written = ["a/b/2", "a/b/1", "a-b", "a/bc", "z", "a/b-c/x"]
        for key in written:
            store.write(key, b"")
        assert list(store.keys("")) == sorted(written)
        assert list(store.keys("a")) == ["a/b-c/x", "a/b/1", "a/b/2", "a/bc"]
        assert list(store.keys("a/b")) == ["a/b/1", "a/b/2"]
        assert list(store.keys("nothing")) == []
        assert list(store.keys("z")) == []

    def test_names_may_hold_spaces_and_letters_of_any_script(self, store):
        key = "two words/ünïcode +%&?#=~ 画.png"
        store.write(key, b"1")
        assert list(store.keys("two words")) == [key]
        with store.read(key) as body:
            assert body.read() == b"1"

    def test_remove_can_be_repeated(self, store):
        store.write("a/b", b"")
        store.write("a/c", b"")
        for _ in range(2):
            store.remove("a/b")
        store.remove("never/there")
        assert list(store.keys("")) == ["a/c"]

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.", "a\\b", "a\n"]
    )
    def test_keys_that_could_leave_the_store_are_refused(self, store, key):
        for act in (store.read, store.remove, lambda k: store.write(k, b"")):
            with pytest.raises(StoreError, match="not a key"):
                act(key)

    @pytest.mark.parametrize("good", [10, 20 * 2**20])
    def test_a_body_that_breaks_stores_nothing(self, store, good):
        store.write("key", b"before")
        for key in ("key", "new/key"):
            with pytest.raises(RuntimeError, match="the source broke"):
                store.write(key, BreaksHalfway(good))
        assert list(store.keys("")) == ["key"]
        with store.read("key") as body:
            assert body.read() == b"before"

    def test_a_large_body_comes_back_whole_and_in_pieces(self, store):
        body = bytes(range(251)) * (36 * 2**20 // 251)
        store.write("large", io.BytesIO(body))
        with store.read("large") as stream:
            assert stream.read() == body
            stream.seek(33 * 2**20)
            assert stream.read(1000) == body[33 * 2**20 :][:1000]
            assert stream.seek(0, io.SEEK_END) == len(body)
            assert stream.read(1) == b""

    def test_threads_write_at_once(self, store):
        threads = [
            threading.Thread(target=store.write, args=(f"k/{i}", b"%d" % i)) for i in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(store.keys("k"))) == 12

    def test_another_opening_sees_it(self, store, again):
        store.write("a/b", b"1")
        other = again()
        assert other.url == store.url
        assert list(other.keys("")) == ["a/b"]

    def test_publishes_reads_and_withdraws(self, store):
        publish(store, "p", {"x/y": b"1", "z": lambda: b"22"}, {"loss": 0.5})
        manifest = published(store, "p")
        assert manifest is not None
        assert manifest.meta == {"loss": 0.5}
        assert read_bytes(store, "p", "z") == b"22"
        withdraw(store, "p")
        assert published(store, "p") is None
        assert list(store.keys("")) == []
