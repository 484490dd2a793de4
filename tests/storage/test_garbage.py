"""The collector, on a folder and on a real S3 server: what was cut off, and nothing else."""

from __future__ import annotations

import os
import time

import pytest
import torch

from storage import layout
from storage.checkpoint import Saver
from storage.garbage import discard, find_garbage, kept_students
from storage.manifest import publish, published
from storage.registry import Entry, add
from storage.store import open_store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(
        str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_url")
    )


def checkpoint(store, trial):
    saver = Saver(store, layout.checkpoint("sweep", "10B", trial))
    saver.save(1, {"w": torch.ones(2)}, None)
    saver.finish()


def replacement_checkpoint(store, digest):
    prefix = layout.replacement("t", digest)
    saver = Saver(store, layout.library_checkpoints(prefix, "sweep"))
    saver.save(1, {"w": torch.ones(2)}, None)
    saver.finish()
    return prefix


def fill(store):
    """A store in use."""
    publish(store, "encoded/d", {"a": b"1"})
    publish(store, "encoded/d/shards/0", {"a": b"1"})
    publish(store, layout.sweep("sweep"), {"config.json": b"{}"})
    store.write(f"{layout.stage('sweep', 'search')}/attempt.json", b"{}")
    store.write(f"{layout.search('sweep')}/scores/x.json", b"{}")
    store.write(layout.confirmed("sweep", "d"), b"{}")
    checkpoint(store, "running")
    replacement_checkpoint(store, "running")
    publish(store, layout.model("10B", "best"), {"w": b"1"})
    entry = Entry(
        budget="10B", plan_digest="p", teacher="t", sweep="sweep", prefix="s",
        model=layout.model("10B", "best"), parameters=1, fidelity_loss=0.1,
    )  # fmt: skip
    add(store, entry)


def listed(store):
    return [(garbage.kind, garbage.prefix) for garbage in find_garbage(store, 0)]


def test_a_store_in_use_has_none(store):
    fill(store)
    assert listed(store) == []


def test_what_was_cut_off_is_found_and_removed_on_request(store):
    fill(store)
    before = set(store.keys(""))
    store.write("library/t/cut/tensors.safetensors", b"123")
    store.write(f"{layout.checkpoint('sweep', '10B', 'running')}/step-000000009/x", b"1")
    store.write("encoded/d/stray", b"1")
    checkpoint(store, "ended")
    publish(store, layout.finalist("sweep", "10B", "ended"), {"plan.json": b"{}"})
    publish(store, layout.model("10B", "nobody"), {"w": b"1"})
    found = find_garbage(store, 0)
    ended = f"{layout.checkpoint('sweep', '10B', 'ended')}/step-000000001"
    assert [(garbage.kind, garbage.prefix) for garbage in found] == [
        ("unfinished publication", "encoded/d"),
        ("unfinished publication", "library/t/cut"),
        ("unfinished publication", "sweeps/sweep/recovery/10B/running/checkpoints/step-000000009"),
        ("old checkpoint", ended),
        ("unregistered model", "models/10B/nobody"),
    ]
    assert found[1].size == 3
    for garbage in found:
        discard(store, garbage)
        discard(store, garbage)
    assert listed(store) == []
    student = layout.finalist("sweep", "10B", "ended")
    assert set(store.keys("")) == before | {f"{student}/plan.json", f"{student}/manifest.json"}
    assert published(store, "encoded/d") is not None


def test_checkpoints_of_a_sweep_that_has_recovered_are_old(store):
    for trial in ("stopped", "broke", "begun-since"):
        checkpoint(store, trial)
    assert listed(store) == []
    recoveries = [
        {"budget": "10B", "trial": "stopped", "broke": False},
        {"budget": "10B", "trial": "broke", "broke": True},
        {"budget": "6B", "trial": "begun-since", "broke": False},
    ]
    facts = {"facts": {"recoveries": recoveries}}
    publish(store, layout.stage("sweep", "recover"), {}, facts)
    store.write(layout.attempt("sweep", "recover"), b"{}")
    at = layout.checkpoint("sweep", "10B", "stopped")
    assert listed(store) == [("old checkpoint", f"{at}/step-000000001")]
    # Once nothing is under way any more, what the record does not know is another configuration's.
    store.remove(layout.attempt("sweep", "recover"))
    other = layout.checkpoint("sweep", "10B", "begun-since")
    assert listed(store) == [
        ("old checkpoint", f"{prefix}/step-000000001") for prefix in (other, at)
    ]


def test_students_that_were_not_published_go_when_asked_for(store):
    fill(store)
    chosen, lost = (layout.finalist("other", "10B", trial) for trial in ("chosen", "lost"))
    for student in (chosen, lost):
        publish(store, student, {"plan.json": b"{}"})

    def students():
        found = find_garbage(store, 0, students=True)
        return [garbage.prefix for garbage in found if garbage.kind == "unpublished student"]

    assert students() == []  # its sweep has published none yet
    facts = {"facts": {"students": {"10B": {"finalist": chosen, "prefix": "models/10B/x"}}}}
    publish(store, layout.stage("other", "publish"), {}, facts)
    assert listed(store) == []
    assert students() == [lost]
    for stage in ("recover", "publish"):
        store.write(layout.attempt("other", stage), b"{}")
        assert students() == []  # it is at work again
        store.remove(layout.attempt("other", stage))
    assert students() == [lost]
    assert kept_students(store, "other") == {chosen}
    assert kept_students(store, "sweep") is None
    store.write(f"{layout.stage('other', 'publish')}/manifest.json", b"{damaged")
    assert students() == []


def test_a_student_of_an_entry_or_younger_than_the_publication_stays(tmp_path):
    store = open_store(str(tmp_path))
    named, younger = (layout.finalist("other", "10B", trial) for trial in ("named", "younger"))
    facts = {"facts": {"students": {"6B": {"finalist": "another", "prefix": "models/6B/x"}}}}
    publish(store, named, {"plan.json": b"{}"})
    add(store, Entry(
        budget="10B", plan_digest="p", teacher="t", sweep="other", prefix=named, parameters=1,
        fidelity_loss=0.1,
    ))  # fmt: skip
    publish(store, layout.stage("other", "publish"), {}, facts)
    an_hour_ago = time.time() - 3600
    for file in (tmp_path / "sweeps").rglob("*.json"):
        os.utime(file, (an_hour_ago, an_hour_ago))
    publish(store, younger, {"plan.json": b"{}"})
    assert find_garbage(store, 0, students=True) == []
    os.utime(tmp_path / younger / "plan.json", (0, 0))
    os.utime(tmp_path / younger / "manifest.json", (0, 0))
    (found,) = find_garbage(store, 0, students=True)
    assert found.prefix == younger


def test_checkpoints_of_a_replacement_that_is_trained_are_old(store):
    prefix = replacement_checkpoint(store, "d")
    assert listed(store) == []
    publish(store, prefix, {"block.safetensors": b"1"})
    (garbage,) = find_garbage(store, 0)
    assert garbage.kind == "old checkpoint"
    discard(store, garbage)
    assert set(store.keys("library")) == {f"{prefix}/block.safetensors", f"{prefix}/manifest.json"}


def test_a_model_that_is_being_written_is_as_young_as_its_youngest_file(tmp_path):
    store = open_store(str(tmp_path))
    for part in ("text_encoder", "transformer"):
        store.write(f"models/10B/new/{part}/w", b"1")
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "models/10B/new/text_encoder/w", (an_hour_ago, an_hour_ago))
    assert find_garbage(store, 1800) == []
    (garbage,) = find_garbage(store, 0)
    assert (garbage.kind, garbage.prefix) == ("unfinished publication", "models/10B/new")
    assert len(garbage.keys) == 2


def test_a_copy_of_the_best_that_is_being_replaced_is_not_listed(store):
    fill(store)
    publish(store, "best/10B", {"vae/w": b"1", "plan.json": b"1"})
    store.remove("best/10B/manifest.json")
    assert listed(store) == []


def test_a_storage_folder_that_is_not_there_yet_has_none(tmp_path):
    assert listed(open_store(str(tmp_path / "runs"))) == []


def test_what_is_young_is_never_listed(store):
    store.write("library/t/cut/tensors.safetensors", b"123")
    assert find_garbage(store, 3600) == []
    assert len(find_garbage(store, 0)) == 1


def test_nothing_beside_a_damaged_manifest_is_listed(store):
    publish(store, "library/t/d", {"a": b"1"})
    store.write("library/t/d/manifest.json", b"{")
    assert listed(store) == []


def test_models_beside_a_damaged_entry_stay(store, caplog):
    fill(store)
    (key,) = store.keys("registry")
    store.write(key, b"{")
    publish(store, layout.model("50pct", "nobody"), {"w": b"1"})
    assert listed(store) == [("unregistered model", "models/50pct/nobody")]
    assert f"{key}: not a registry entry" in caplog.text


def test_an_open_upload_is_ended(s3_url):
    store = open_store(s3_url)
    name = f"{store._prefix}/library/t/d/a"
    upload = store._call("create_multipart_upload", Key=name)["UploadId"]
    store._call("upload_part", Key=name, UploadId=upload, PartNumber=1, Body=b"1")
    (garbage,) = find_garbage(store, 0)
    assert (garbage.kind, garbage.prefix) == ("unfinished upload", "library/t/d/a")
    discard(store, garbage)
    assert list(store.unfinished("")) == []
    discard(store, garbage)


def test_what_others_keep_beside_it_is_never_listed(store):
    store.write("pictures/1.png", b"1")
    store.write("pictures/manifest.json", b"of another tool")
    store.write("notes.txt", b"1")
    publish(store, "sweeps-of-another/d", {"a": b"1"})
    assert listed(store) == []


def test_an_upload_of_others_stays_open(s3_url):
    store = open_store(s3_url)
    store._call("create_multipart_upload", Key=f"{store._prefix}/pictures/1.tar")
    assert listed(store) == []


def test_what_a_killed_writer_left_in_a_folder_is_removed(tmp_path):
    store = open_store(str(tmp_path))
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "abc").write_bytes(b"half")
    (garbage,) = find_garbage(store, 0)
    assert garbage.kind == "unfinished upload"
    discard(store, garbage)
    assert list((tmp_path / ".partial").iterdir()) == []
