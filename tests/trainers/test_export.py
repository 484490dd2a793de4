"""An exported student is a pipeline folder like any other."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

import trainers.export
from storage.manifest import fetch, publish
from storage.shards import publish_tensors
from storage.store import open_store
from storage.stored import open_tensors
from trainers.export import ExportError, export_student, load_pipeline, pipeline_files
from trainers.students.plan import BlockPlan, Plan, load_plan, uniform_plan
from trainers.students.surgery import assemble
from trainers.teacher import TeacherError

DEPTH = uniform_plan("qwen_image", 6, 3, start="middle")
WIDTH = Plan(
    family="qwen_image",
    teacher_blocks=6,
    blocks=(BlockPlan(span=(0, 2), ffn=0.5), BlockPlan(span=(3, 5), start="average")),
)


def draw(pipeline: QwenImagePipeline) -> torch.Tensor:
    return pipeline(
        prompt="a red circle", height=64, width=64, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize("plan", [DEPTH, WIDTH], ids=["depth", "width"])
def test_a_student_draws_the_same_from_its_folder(teacher, tmp_path, plan):
    student = assemble(teacher.transformer(), plan)
    export_student(teacher, student, plan, tmp_path / "student", card="# A student\n")
    loaded = QwenImagePipeline.from_pretrained(tmp_path / "student")
    assert type(loaded.transformer) is type(student)
    wanted = teacher.pipeline()
    wanted.register_modules(transformer=student)
    assert torch.equal(draw(loaded), draw(wanted))
    assert torch.equal(draw(load_pipeline(tmp_path / "student")), draw(wanted))
    assert load_plan(tmp_path / "student" / "plan.json") == plan
    assert (tmp_path / "student" / "README.md").read_text() == "# A student\n"


def test_a_width_cut_pipeline_saved_by_diffusers_loads_again(teacher, tmp_path):
    pipeline = teacher.pipeline()
    pipeline.register_modules(transformer=assemble(teacher.transformer(), WIDTH))
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(load_pipeline(tmp_path)), draw(pipeline))


def test_the_stock_class_loads_a_depth_only_student(teacher, tmp_path):
    student = assemble(teacher.transformer(), DEPTH)
    export_student(teacher, student, DEPTH, tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    loaded = QwenImageTransformer2DModel.from_pretrained(
        tmp_path / "student", subfolder="transformer"
    )
    weights = loaded.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in student.state_dict().items())


def test_dtype_is_cast_in_the_files_only(teacher, tmp_path):
    student = assemble(teacher.transformer(), WIDTH)
    export_student(teacher, student, WIDTH, tmp_path / "student", dtype=torch.bfloat16)
    assert student.dtype == torch.float32
    assert load_pipeline(tmp_path / "student").transformer.dtype == torch.bfloat16


def test_a_large_student_is_sharded(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers.export, "SHARD_BYTES", 50_000)
    student = assemble(teacher.transformer(), WIDTH)
    export_student(teacher, student, WIDTH, tmp_path / "student")
    shards = list((tmp_path / "student" / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    weights = load_pipeline(tmp_path / "student").transformer.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in student.state_dict().items())
    shards[0].unlink()
    with pytest.raises(TeacherError, match=shards[0].name):
        load_pipeline(tmp_path / "student")


def test_few_stored_weights_are_in_memory_at_a_time(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers.export, "SHARD_BYTES", 50_000)
    student = assemble(teacher.transformer(), WIDTH)
    weights = student.state_dict()
    store = open_store(str(tmp_path))
    publish_tensors(store, "student", weights, {})
    stored = open_tensors(store, "student")
    held: list[int] = []

    def read(name: str) -> torch.Tensor:
        tensor = stored.read(name)
        held.append(1)
        weakref.finalize(tensor, held.remove, 1)
        # Four files at a time; in each, the one before is let go when the next is there.
        assert len(held) <= 8 < len(weights) / 4
        return tensor

    publish(store, "model", pipeline_files(teacher, WIDTH, stored.like(), read, torch.bfloat16))
    fetch(store, "model", tmp_path / "copy")
    loaded = load_pipeline(tmp_path / "copy").transformer.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[k], v.bfloat16()) for k, v in weights.items())


def test_what_is_there_is_not_overwritten(teacher, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ExportError, match="already holds something"):
        export_student(teacher, assemble(teacher.transformer(), DEPTH), DEPTH, tmp_path)


def test_a_failed_export_leaves_nothing(teacher, tmp_path):
    student = assemble(teacher.transformer(), DEPTH)
    with pytest.raises(ExportError, match="not its weights"):
        export_student(teacher, student, WIDTH, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
