from __future__ import annotations

import pytest
import torch

import storage.checkpoint
from storage.checkpoint import keep_last, latest_checkpoint, save_checkpoint
from storage.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def steps(store):
    return [key.split("/")[1] for key in store.keys("run") if key.endswith("manifest.json")]


def save(store, step):
    tensors = {"w": torch.full((4,), float(step)), "rng": torch.get_rng_state()}
    save_checkpoint(store, "run", step, tensors, {"phase": 1, "step": step, "losses": [0.5]})


def test_no_checkpoint_is_none(store):
    assert latest_checkpoint(store, "run") is None


def test_the_newest_comes_back_with_all_it_carried(store, s3_url):
    for any_store in (store, open_store(s3_url)):
        for step in (9, 10, 2):
            save(any_store, step)
        found = latest_checkpoint(any_store, "run")
        assert found is not None
        assert found.step == 10
        assert torch.equal(found.tensors["w"], torch.full((4,), 10.0))
        assert found.tensors["rng"].dtype == torch.uint8
        assert found.state == {"phase": 1, "step": 10, "losses": [0.5]}


def test_large_states_go_out_in_several_files(store, monkeypatch):
    monkeypatch.setattr(storage.checkpoint, "_FILE_BYTES", 40)
    tensors = {f"t{i}": torch.full((n,), float(i)) for i, n in enumerate([3, 5, 5, 20, 1, 1])}
    save_checkpoint(store, "run", 1, tensors, None)
    names = [key for key in store.keys("run") if key.endswith(".safetensors")]
    assert len(names) == 4
    found = latest_checkpoint(store, "run")
    assert found is not None
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda s, at: s.write(f"{at}/tensors-00000.safetensors", b"cut"),
        lambda s, at: s.remove(f"{at}/state.json"),
        lambda s, at: s.write(f"{at}/manifest.json", b"{"),
    ],
)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(store, caplog, damage):
    for step in (1, 2):
        save(store, step)
    damage(store, "run/step-000000002")
    found = latest_checkpoint(store, "run")
    assert found is not None
    assert found.step == 1
    assert "step-000000002" in caplog.text
    assert "using the checkpoint before it" in caplog.text


def test_an_unfinished_save_does_not_count(store):
    save(store, 1)
    store.write("run/step-000000002/tensors-00000.safetensors", b"")
    found = latest_checkpoint(store, "run")
    assert found is not None
    assert found.step == 1


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


def test_keeping_none_is_refused(store):
    with pytest.raises(ValueError, match="at least 1"):
        keep_last(store, "run", 0)


def test_nan_in_the_state_is_refused(store):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(store, "run", 1, {}, {"loss": float("nan")})
    assert list(store.keys("")) == []
