"""A FLUX.1 pipeline is opened, encoded, trained from, cut and written as a Qwen-Image one is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search.config import SweepConfig
from search.sweep import SweepError, open_sweep
from storage.store import open_store
from tests.flux import save_tiny_flux
from tests.trainers.students.tiny import run_blocks
from trainers.data.encode import PictureEncoders
from trainers.data.latents import Latents, Shard, training_inputs
from trainers.evaluate import fidelity_loss, generate
from trainers.export import export_student, load_pipeline
from trainers.library.config import TrainingConfig
from trainers.library.train import train_replacements
from trainers.probe import ProbeConfig, make_probe
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble
from trainers.teacher import Teacher, TeacherError, open_teacher
from trainers.worker import load_student, publish_student

CAPTIONS = ["a red circle", "two blue squares", "a cross", "a green circle above a red cross"]

DEPTH = Plan(
    family="flux",
    teacher_blocks=6,
    blocks=tuple(BlockPlan(span=span) for span in ((0, 1), (2, 2), (3, 5))),
)
WIDTH = Plan(
    family="flux",
    teacher_blocks=6,
    blocks=(
        BlockPlan(span=(0, 0)),
        BlockPlan(span=(1, 2), text="projected", ffn="linear"),
        BlockPlan(span=(3, 5), ffn=0.5),
    ),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return open_teacher(save_tiny_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoded(teacher: Teacher, pictures: np.ndarray) -> dict[str, torch.Tensor]:
    return PictureEncoders(teacher, torch.float32, "cpu").encode(pictures, CAPTIONS, 3)


@pytest.fixture(scope="module")
def latents(encoded: dict[str, torch.Tensor]) -> Latents:
    shards = [
        Shard(captions=tuple(CAPTIONS[part]), **{k: t[part] for k, t in encoded.items()})
        for part in (slice(0, 3), slice(3, 4))
    ]
    return Latents(shards, held_out=1)


def test_encoded_is_what_the_pipeline_itself_reads(teacher, pictures, encoded, latents):
    pipeline = teacher.pipeline()
    signal = torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        raw = pipeline.vae.encode(signal).latent_dist.mode()
        embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS)
    torch.testing.assert_close(encoded["latents"], (raw - 0.1159) * 0.3611)
    torch.testing.assert_close(encoded["embeds"], embeds)
    torch.testing.assert_close(encoded["pooled"], pooled)
    assert encoded["mask"].all()  # FLUX reads padding
    batch = latents.batch([3, 1]).to("cpu", torch.bfloat16)
    assert batch.mask_BM is None
    torch.testing.assert_close(batch.pooled_BP, pooled[[3, 1]].bfloat16())
    packed = pipeline._pack_latents(encoded["latents"][[3, 1]], 2, 16, 8, 8)
    torch.testing.assert_close(batch.clean_BNC, packed.bfloat16())


def test_what_is_encoded_runs_through_the_teacher(teacher, latents):
    model = teacher.transformer()
    inputs, _ = training_inputs(latents.batch([0, 2]), seed=0)
    with torch.no_grad():
        velocity = teacher.family.forward(model, inputs)
        assert torch.equal(run_blocks(teacher.family, model, inputs), velocity)
    probe = make_probe(model, teacher.family, latents, ProbeConfig(timesteps=2), seed=0)
    assert fidelity_loss(model, teacher.family, probe) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacements_of_both_kinds_learn(teacher, latents, dtype):
    blocks = [block for block in (*DEPTH.blocks, *WIDTH.blocks) if not block.untouched]
    trained = train_replacements(
        teacher.transformer(dtype),
        teacher.family,
        blocks,
        latents,
        TrainingConfig(steps=12, batch_size=3, lr=3e-3, warmup=0),
        seed=0,
    )
    for one in trained.values():
        assert one.failed is None
        assert sum(one.losses[-4:]) < sum(one.losses[:4])


@pytest.mark.parametrize("plan", [DEPTH, WIDTH], ids=["stock", "pruned"])
def test_an_exported_student_draws_what_it_drew_in_the_teachers_pipeline(teacher, plan, tmp_path):
    student = assemble(teacher.transformer(), plan)
    export_student(teacher, student, plan, tmp_path / "student")
    loaded, whole = load_pipeline(tmp_path / "student"), teacher.pipeline()
    assert type(loaded.transformer).__name__ == teacher.family.student_class(plan)[1]
    whole.transformer = student
    ours, theirs = (generate(p, CAPTIONS[:2], 0, steps=2, size=64) for p in (loaded, whole))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_captions_are_as_long_as_the_models_tokenizer_says(teacher):
    pipeline = teacher.pipeline()
    pipeline.tokenizer_2.model_max_length = 24
    assert teacher.family.encode_texts(pipeline, CAPTIONS[:1]).embeds_BMD.shape[1] == 24
    pipeline.tokenizer_2.model_max_length = int(1e30)  # what a tokenizer without a limit says
    assert teacher.family.encode_texts(pipeline, CAPTIONS[:1]).embeds_BMD.shape[1] == 512


def test_a_recovered_student_is_stored_and_loads_again(teacher, tmp_path):
    store = open_store(str(tmp_path / "store"))
    student = assemble(teacher.transformer(), WIDTH)
    publish_student(store, "student", WIDTH, student.state_dict(), teacher)
    loaded, plan = load_student(store, "student", teacher)
    assert plan == WIDTH
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_every_part_of_the_pipeline_is_checked(teacher, tmp_path):
    folder = save_tiny_flux(tmp_path / "flux")
    assert open_teacher(folder).encoder_digest == teacher.encoder_digest
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
    assert open_teacher(folder).encoder_digest != teacher.encoder_digest
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"text_encoder_2/model.safetensors: missing"):
        open_teacher(folder)


def test_a_sweep_offers_only_what_a_student_may_have(teacher, tmp_path):
    config = {
        "name": "flux",
        "teacher": str(teacher.folder),
        "storage": str(tmp_path / "runs"),
        "budgets": ["60%"],
        "library": {"max_span": 4, "widths": [0.5, "linear"], "texts": ["projected", "shared"]},
    }
    offered = open_sweep(SweepConfig.model_validate(config)).candidates
    assert BlockPlan(span=(0, 2), start="library", ffn="linear") in offered
    assert BlockPlan(span=(3, 5), start="library", ffn=0.5) in offered
    assert all(teacher.family.refusal(teacher.config, block) is None for block in offered)
    plan = {"family": "flux", "teacher_blocks": 6, "blocks": [{"span": [0, 3]}, {"span": [4, 5]}]}
    with pytest.raises(SweepError, match=r"plan: block 0: span \[0, 3\] crosses"):
        open_sweep(SweepConfig.model_validate({**config, "plan": plan}))
