"""A teacher is proven whole before it is loaded, and its digest is its content's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.store import open_store
from trainers.students.families.base import FamilyError
from trainers.teacher import TeacherError, open_teacher, open_very_teacher, seal_pipeline


@pytest.fixture
def copy(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may damage."""
    return shutil.copytree(tiny_pipeline, tmp_path / "copy")


def test_a_teacher_knows_its_family_config_and_digest(tiny_pipeline, copy):
    teacher = open_teacher(tiny_pipeline)
    assert teacher.family.name == "qwen_image"
    assert teacher.config["num_layers"] == 6
    assert teacher.name == str(tiny_pipeline)
    other = open_teacher(str(copy))
    assert (other.digest, other.encoder_digest) == (teacher.digest, teacher.encoder_digest)
    assert teacher.digest != teacher.encoder_digest


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", (True, False)),
        ("transformer/config.json", (True, False)),
        ("vae/diffusion_pytorch_model.safetensors", (False, True)),
        ("text_encoder/model.safetensors", (False, True)),
        ("tokenizer/tokenizer.json", (False, True)),
        ("scheduler/scheduler_config.json", (False, False)),
    ],
)
def test_each_digest_covers_its_parts(tiny_pipeline, copy, file, changes):
    before = open_teacher(tiny_pipeline)
    content = bytearray((copy / file).read_bytes())
    if file.endswith(".json"):
        content += b"\n"
    else:
        content[-1] ^= 1
    (copy / file).write_bytes(content)
    after = open_teacher(copy)
    assert (after.digest != before.digest, after.encoder_digest != before.encoder_digest) == changes


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(TeacherError) as caught:
        open_teacher(copy)
    assert str(copy / file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights_are_named(copy, file, kept):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:kept])
    with pytest.raises(TeacherError) as caught:
        open_teacher(copy)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_a_part_is_refused(copy):
    file = copy / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(TeacherError, match=r"model_index\.json: no text_encoder"):
        open_teacher(copy)


def test_a_missing_shard_is_named(copy):
    part = copy / "transformer"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "a-00001.safetensors")
    index = {"weight_map": {"x": "a-00001.safetensors", "y": "a-00002.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=r"a-00002\.safetensors: missing"):
        open_teacher(copy)


def test_an_unknown_transformer_is_refused_with_its_file(copy):
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"_class_name": "SD3Transformer2DModel"}
    file.write_text(json.dumps(config))
    with pytest.raises(FamilyError, match=r"transformer/config\.json.*SD3Transformer2DModel"):
        open_teacher(copy)


@pytest.mark.parametrize("name", ["gone", "/gone/teacher", "./gone/teacher", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TeacherError, match=f"teacher {name}: no such folder"):
        open_teacher(name)


def test_a_hub_name_without_a_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="teacher nobody/nothing: neither a folder") as caught:
        open_teacher("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_parts_load_frozen_in_the_dtype_asked_for(tiny_pipeline):
    teacher = open_teacher(tiny_pipeline)
    for part in (teacher.transformer(), teacher.vae(), teacher.text().text_encoder):
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
    assert teacher.transformer(torch.bfloat16).dtype == torch.bfloat16


def test_the_dtype_of_the_files_is_kept(copy):
    from diffusers import QwenImageTransformer2DModel

    part = copy / "transformer"
    half = QwenImageTransformer2DModel.from_pretrained(part).to(torch.bfloat16)
    half.save_pretrained(part)
    teacher = open_teacher(copy)
    assert {p.dtype for p in teacher.transformer().parameters()} == {torch.bfloat16}
    pipeline = teacher.pipeline()
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32


def test_text_encodes_captions_as_the_pipeline_does(tiny_pipeline):
    teacher = open_teacher(tiny_pipeline)
    captions = ["a red circle", "a red circle above a blue square"]
    with torch.no_grad():
        embeds, mask = teacher.text().encode_prompt(captions)
        wanted, _ = teacher.pipeline().encode_prompt(captions)
    assert torch.equal(embeds, wanted)
    assert embeds.shape[:2] == mask.shape
    assert mask[0].sum() < mask[1].sum()


@pytest.mark.parametrize("root", ["s3_url", "tmp_path"])
def test_a_pipeline_that_others_copied_to_a_store_becomes_a_teacher(
    tiny_pipeline, request, tmp_path, monkeypatch, root
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = request.getfixturevalue(root)
    url = f"{where if root == 's3_url' else where.as_uri()}/models/mine"
    store = open_store(url.rpartition("/")[0])
    for file in tiny_pipeline.rglob("*"):
        if file.is_file():
            store.write(f"mine/{file.relative_to(tiny_pipeline).as_posix()}", file.read_bytes())
    with pytest.raises(TeacherError, match=f"no manifest.json.*espalier seal {url}"):
        open_teacher(url)
    seal_pipeline(url)
    sealed, here = open_teacher(url), open_teacher(tiny_pipeline)
    assert (sealed.digest, sealed.encoder_digest) == (here.digest, here.encoder_digest)
    with pytest.raises(TeacherError, match="published already"):
        seal_pipeline(url)


def test_what_is_no_pipeline_is_not_sealed(tmp_path):
    store = open_store(str(tmp_path))
    url = f"{tmp_path.as_uri()}/mine"
    with pytest.raises(TeacherError, match=r"model_index\.json: missing"):
        seal_pipeline(url)
    store.write("mine/model_index.json", b"{}")
    store.write("mine/transformer/config.json", b'{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(FamilyError, match="SD3Transformer2DModel"):
        seal_pipeline(url)
    assert not list(tmp_path.rglob("manifest.json"))


def test_workers_refuse_a_teacher_that_took_anothers_place(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "teacher")
    digest = open_teacher(folder).digest
    assert open_very_teacher(str(folder), digest, None).digest == digest
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    with pytest.raises(TeacherError, match=f"replaced since this sweep began .it was {digest}"):
        open_very_teacher(str(folder), digest, None)
