"""Models that are built empty and filled from files: equal to whole ones, and never whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from storage.errors import DamagedError
from storage.manifest import publish
from storage.store import StoreOptions, open_store
from tests.trainers.ranks import full
from trainers.distilled import Distilled
from trainers.sharded import load_distilled, load_observed
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block
from trainers.teacher import Teacher, TeacherError, open_teacher
from trainers.weights import Weights

PLAN = Plan(
    family="qwen_image",
    teacher_blocks=6,
    blocks=(
        BlockPlan(span=(0, 1), start="average"),
        BlockPlan(span=(2, 3), start="library"),
        BlockPlan(span=(4, 4), ffn=0.5),
        BlockPlan(span=(5, 5), text="shared"),
    ),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def remote(tiny_pipeline: Path, s3_url: str, tmp_path: Path, monkeypatch) -> Teacher:
    """The tiny pipeline, published in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {
        str(file.relative_to(tiny_pipeline)): file
        for file in tiny_pipeline.rglob("*")
        if file.is_file()
    }
    publish(open_store(s3_url), "best/tiny", files)
    return open_teacher(f"{s3_url}/best/tiny")


def test_a_filled_model_is_the_whole_one(teacher, group):
    model = teacher.transformer()
    block = make_block(
        teacher.family,
        teacher.config,
        teacher.family.block_modules(model),
        BlockPlan(span=(2, 3), start="first"),
    )
    weights = {name: tensor + 1 for name, tensor in block.state_dict().items()}
    expected = assemble(model, PLAN, lambda _: weights)
    student = load_distilled(teacher, PLAN, lambda _: weights, CPU)
    assert_same(student.student, expected)
    for sharded in (True, False):
        assert_same(load_observed(teacher, CPU, sharded).teacher, model)


def test_a_teacher_in_a_bucket_is_read_by_range(teacher, remote, group):
    assert (remote.digest, remote.encoder_digest) == (teacher.digest, teacher.encoder_digest)
    assert not list((remote.folder / "transformer").glob("*.safetensors"))
    model = teacher.transformer()
    assert_same(remote.transformer(), model)
    assert_same(load_observed(remote, CPU, sharded=True).teacher, model)
    cut = PLAN.model_copy(update={"blocks": (BlockPlan(span=(0, 5), start="average"),)})
    student = load_distilled(remote, cut, None, CPU)
    assert isinstance(student, Distilled)
    assert_same(student.student, assemble(model, cut))


def test_a_teacher_in_a_bucket_is_read_from_the_configured_server(
    teacher, remote, s3_server, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    found = open_teacher(remote.name, StoreOptions(endpoint=s3_server.endpoint))
    assert found.digest == teacher.digest
    name = "transformer_blocks.3.attn.to_q.weight"
    assert torch.equal(found.weights().read(name), teacher.weights().read(name))


def test_a_teacher_that_was_damaged_in_its_bucket_is_not_loaded(remote, s3_url):
    store, key = open_store(s3_url), "best/tiny/transformer/diffusion_pytorch_model.safetensors"
    with store.read(key) as stream:
        content = bytearray(stream.read())
    content[-1] ^= 1
    store.write(key, bytes(content))
    with pytest.raises(DamagedError, match=f"{key}: its content is not"):
        remote.transformer()


def test_a_bucket_without_a_published_model_is_refused(s3_url):
    with pytest.raises(TeacherError, match="no model is published there"):
        open_teacher(f"{s3_url}/best/none")


def test_rows_are_read_alone(teacher):
    weights = teacher.weights()
    name = "transformer_blocks.3.attn.to_q.weight"
    whole = teacher.transformer().get_parameter(name)
    assert torch.equal(weights.read(name), whole)
    assert torch.equal(weights.read(name, 5, 9), whole[5:9])
    assert weights.read(name, 4, 4).shape == (0, 16)


def test_a_weight_that_is_not_there_is_named(teacher):
    with pytest.raises(DamagedError, match=r"diffusion_pytorch_model\.safetensors.*nothing\.here"):
        teacher.weights().read("nothing.here")


def test_a_file_that_ends_early_is_named(teacher, tmp_path):
    (file,) = (teacher.folder / "transformer").glob("*.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-9])
    weights = Weights({str(cut): lambda: cut.open("rb", buffering=0)})
    last = max(weights.names, key=lambda name: weights._places[name].begin)
    with pytest.raises(DamagedError, match=r"cut\.safetensors: cut short"):
        weights.read(last)


def test_a_rank_never_holds_a_whole_model(tmp_path: Path) -> None:
    """Rank 0 of 8, against its shards and the blocks of one span."""
    from diffusers import QwenImageTransformer2DModel

    blocks = 24
    model = QwenImageTransformer2DModel(
        num_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    whole = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    model.save_pretrained(tmp_path / "transformer", max_shard_size="50MB")
    del model
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.loading", str(tmp_path), "8"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    shards = (whole + whole / 2) / 8
    assert grown < shards + 6 * block
    assert shards + 6 * block < whole / 2


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(full(parameter.detach()), wanted[name]), name
