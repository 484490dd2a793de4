from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import storage.checkpoint
from storage.checkpoint import Checkpoint, Saver, keep_last, latest_checkpoint, withdraw_from
from storage.errors import StoreError
from storage.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def steps(store):
    return [key.split("/")[1] for key in store.keys("run") if key.endswith("manifest.json")]


def save(store, step, **options):
    tensors = {"w": torch.full((4,), float(step)), "rng": torch.get_rng_state()}
    saver = Saver(store, "run", keep=9, **options)
    saver.save(step, tensors, {"phase": 1, "step": step, "losses": [0.5]})
    saver.finish()


def load(store):
    """The newest whole checkpoint and its weights."""
    weights = torch.zeros(4)
    found = latest_checkpoint(store, "run", lambda c: c.tensors.fill({"w": weights}))
    return found, weights


def test_no_checkpoint_is_none(store):
    assert latest_checkpoint(store, "run", lambda checkpoint: None) is None


def test_the_newest_comes_back_with_all_it_carried(store, s3_url):
    for any_store in (store, open_store(s3_url)):
        for step in (9, 10, 2):
            save(any_store, step)
        found, weights = load(any_store)
        assert found is not None
        assert found.step == 10
        assert torch.equal(weights, torch.full((4,), 10.0))
        assert torch.equal(found.tensors.read("rng"), torch.get_rng_state())
        assert found.state == {"phase": 1, "step": 10, "losses": [0.5]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda s, at: s.write(f"{at}/0-1-rank-00000.safetensors", b"cut"),
        lambda s, at: s.write(
            f"{at}/0-1-rank-00000.safetensors",
            bytes(len(s.read(f"{at}/0-1-rank-00000.safetensors").read())),
        ),
        lambda s, at: s.remove(f"{at}/0-1-rank-00000.safetensors"),
        lambda s, at: s.remove(f"{at}/state.json"),
        lambda s, at: s.write(f"{at}/index.json", b"{}"),
        lambda s, at: s.write(f"{at}/manifest.json", b"{"),
    ],
)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(store, caplog, damage):
    for step in (1, 2):
        save(store, step)
    damage(store, "run/step-000000002")
    found, weights = load(store)
    assert found is not None
    assert found.step == 1
    assert torch.equal(weights, torch.ones(4))
    assert "step-000000002" in caplog.text
    assert "using the checkpoint before it" in caplog.text


def test_one_rank_that_finds_damage_takes_all_to_the_checkpoint_before(store):
    for step in (1, 2):
        save(store, step)
    # What the least over all ranks would be, where another rank cannot read step 2.
    answers = iter([0, 2, 0, 1, 1])
    found = latest_checkpoint(store, "run", lambda c: None, lambda value: next(answers))
    assert isinstance(found, Checkpoint)
    assert found.step == 1


def test_what_training_went_back_before_does_not_count_any_more(store):
    for step in (1, 2, 3):
        save(store, step)
    store.write("run/step-000000004/state.json", b"")
    withdraw_from(store, "run", 3)
    assert {key.split("/")[1] for key in store.keys("run")} == {
        "step-000000001", "step-000000002",
    }  # fmt: skip
    found = latest_checkpoint(store, "run", lambda c: None, below=2)
    assert found is not None
    assert found.step == 1
    assert latest_checkpoint(store, "run", lambda c: None, below=1) is None


def test_an_unfinished_save_does_not_count(store):
    save(store, 1)
    store.write("run/step-000000002/0-1-rank-00000.safetensors", b"")
    found, _ = load(store)
    assert found is not None
    assert found.step == 1


def test_the_first_rank_clears_what_a_killed_attempt_left(store):
    save(store, 1)
    store.write("run/step-000000002/0-1-rank-00000.safetensors", b"")
    Saver(store, "run", rank=1, world=2)
    assert any("step-000000002" in key for key in store.keys("run"))
    Saver(store, "run")
    assert not any("step-000000002" in key for key in store.keys("run"))
    assert steps(store) == ["step-000000001"]


class Slow:
    """A store whose writes wait to be let go."""

    def __init__(self, store):
        self._store, self.go, self.writing = store, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def write(self, key, body):
        self.writing.set()
        assert self.go.wait(30)
        self._store.write(key, body)


@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_training_goes_on_while_a_checkpoint_is_sent(store, monkeypatch, in_memory):
    monkeypatch.setattr(storage.checkpoint, "_IN_MEMORY", in_memory)
    slow = Slow(store)
    saver = Saver(slow, "run")
    weights = torch.ones(4)
    saver.save(1, {"w": weights}, None)
    assert slow.writing.wait(30)
    weights += 1  # the next step, while the first is under way
    assert steps(store) == []
    slow.go.set()
    saver.save(2, {"w": weights}, None)
    saver.finish()
    assert steps(store) == ["step-000000001", "step-000000002"]
    for step, value in ((2, 2.0), (1, 1.0)):
        found, read = load(store)
        assert found is not None
        assert found.step == step
        assert torch.equal(read, torch.full((4,), value))
        store.remove(f"run/step-{step:09d}/manifest.json")


def test_an_error_surfaces_at_the_next_save_or_at_the_end(store, monkeypatch):
    saver = Saver(store, "run")

    def full(key, body):
        raise StoreError("full")

    for again in (lambda: saver.save(2, {}, None), saver.finish):
        monkeypatch.setattr(store, "write", full)
        saver.save(1, {"w": torch.ones(4)}, None)
        saver._sending.join()
        monkeypatch.undo()
        with pytest.raises(StoreError, match="full"):
            again()
    saver.save(3, {}, None)
    saver.finish()
    assert steps(store) == ["step-000000003"]


def test_without_room_to_stage_it_is_sent_as_it_is(store, monkeypatch, caplog):
    monkeypatch.setattr(storage.checkpoint, "_IN_MEMORY", 0)

    class Full:
        def write(self, content):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(storage.checkpoint.tempfile, "TemporaryFile", Full)
    save(store, 1)
    assert steps(store) == ["step-000000001"]
    assert "No space left on device" in caplog.text
    assert "TMPDIR" in caplog.text


def test_saving_a_step_again_replaces_it(store):
    for value in (1.0, 2.0):
        saver = Saver(store, "run", token=str(value))
        saver.save(5, {"w": torch.full((4,), value)}, None)
        saver.finish()
    found, weights = load(store)
    assert found is not None
    assert torch.equal(weights, torch.full((4,), 2.0))
    assert sum(key.endswith(".safetensors") for key in store.keys("run")) == 1


def test_keeps_the_newest_and_what_is_being_written(store):
    for step in (1, 3, 4):
        save(store, step)
    store.write("run/step-000000002/state.json", b"")  # its writer was killed
    store.write("run/step-000000005/state.json", b"")  # its writer is at work
    store.write("run/student/w", b"")
    keep_last(store, "run", 2)
    assert steps(store) == ["step-000000003", "step-000000004"]
    assert {key.split("/")[1] for key in store.keys("run")} == {
        "step-000000003", "step-000000004", "step-000000005", "student",
    }  # fmt: skip
    keep_last(store, "run", 9)
    assert len(steps(store)) == 2


def test_a_saver_keeps_the_newest(store):
    saver = Saver(store, "run", keep=2)
    for step in (1, 2, 3):
        saver.save(step, {"w": torch.ones(4)}, None)
    saver.finish()
    assert steps(store) == ["step-000000002", "step-000000003"]


def test_ranks_that_go_back_find_what_the_first_is_just_publishing(store):
    asked, meeting, values = threading.Event(), threading.Barrier(2, timeout=60), [0, 0]

    class Slow:
        """Publishes the second checkpoint only once the other rank asks for the newest."""

        def __getattr__(self, name):
            return getattr(store, name)

        def write(self, key, body):
            if key.endswith("2/index.json"):
                assert asked.wait(60)
            store.write(key, body)

    def run(rank):
        mine = store if rank else Slow()
        saver = Saver(mine, "run", rank=rank, world=2, keep=1)

        def least(value):
            if rank:
                asked.set()
            values[rank] = value
            meeting.wait()
            found = min(values)
            meeting.wait()
            return found

        meeting.wait()
        saver.save(1, {}, None, own={f"w{rank}": torch.ones(2)})
        saver.finish()
        meeting.wait()
        saver.save(2, {}, None, own={f"w{rank}": torch.ones(2)})
        saver.finish()
        found = latest_checkpoint(mine, "run", lambda checkpoint: None, least)
        return found and found.step

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (0, 1))) == [2, 2]


def test_keeping_none_is_refused(store):
    with pytest.raises(ValueError, match="at least 1"):
        keep_last(store, "run", 0)


def test_nan_in_the_state_is_refused(store):
    with pytest.raises(ValueError, match="JSON"):
        Saver(store, "run").save(1, {}, {"loss": float("nan")})
    assert list(store.keys("")) == []
