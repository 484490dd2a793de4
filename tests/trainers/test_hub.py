"""A teacher of the Hugging Face hub is one commit of a model, on every machine."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch

from tests.hub import COMMIT
from trainers.students.families.base import FamilyError
from trainers.teacher import HubModel, TeacherError, open_teacher


@pytest.mark.parametrize("name", ["owner/tiny", "owner/tiny@v1", f"owner/tiny@{COMMIT}"])
def test_a_teacher_of_the_hub_is_the_one_of_its_files(name, hub, tiny_pipeline):
    teacher, local = open_teacher(name), open_teacher(tiny_pipeline)
    assert teacher.name == name
    assert teacher.hub == HubModel("owner/tiny", COMMIT)
    assert teacher.found != local.found
    assert replace(teacher, name=local.name, found=local.found, hub=None) == local
    assert (teacher.family, teacher.config) == (local.family, local.config)
    assert teacher.address == f"owner/tiny@{COMMIT}"
    assert open_teacher(teacher.address) == replace(teacher, name=teacher.address)


def test_a_machine_that_lacks_it_fetches_the_same_commit(hub, tmp_path):
    opened = open_teacher("owner/tiny")
    wanted = opened.transformer().state_dict()
    sent = pickle.dumps(opened)
    shutil.rmtree(tmp_path / "hub")
    hub.asked.clear()
    there = pickle.loads(sent)
    found = there.transformer().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # By its commit: a branch may have gone on since.
    assert hub.asked
    assert all(COMMIT in path for path in hub.asked)


def test_a_folder_that_a_neighbour_is_still_filling_is_not_taken_for_whole(hub, monkeypatch):
    opened = open_teacher("owner/tiny")
    for file in (opened.found / "transformer", opened.found / "vae"):
        shutil.rmtree(file)
    monkeypatch.setattr("trainers.teacher._whole_here", {})  # as in a process that did not open it
    assert list(opened.weights().names) == list(open_teacher("owner/tiny").weights().names)
    assert opened.vae() is not None


def test_a_family_that_is_not_known_is_told_before_weights_are_fetched(hub, tmp_path):
    config = tmp_path / "uploaded" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "Another"}))
    with pytest.raises(FamilyError, match=r"owner/tiny: transformer/config.json.*Another"):
        open_teacher("owner/tiny")
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_a_revision_that_is_not_there_is_one_sentence(hub):
    with pytest.raises(TeacherError, match="owner/tiny@gone: neither a folder") as caught:
        open_teacher("owner/tiny@gone")
    assert "\n" not in str(caught.value)


def test_a_folder_that_only_the_driver_has_is_named(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "mine")
    teacher = open_teacher(folder)
    shutil.rmtree(folder)
    with pytest.raises(TeacherError, match=f"teacher {folder}: no such folder on "):
        teacher.text()
