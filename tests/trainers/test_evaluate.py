from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from storage.store import open_store
from tests.trainers.small import load_transformer, small_latents
from trainers.data.sources import DataError
from trainers.evaluate import (
    FidelityProbe,
    ProbeConfig,
    fidelity_loss,
    generate,
    judge_scores,
    make_probe,
    replacement_damages,
)
from trainers.probe import shared_probe
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block
from trainers.tasks import TASKS

FAMILY = FAMILIES["qwen_image"]
CONFIG = ProbeConfig(pictures=4, timesteps=3, batch_size=3)


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


@pytest.fixture(scope="module")
def probe(teacher: nn.Module) -> FidelityProbe:
    return make_probe(teacher, FAMILY, small_latents(), CONFIG, seed=0)


def test_the_teacher_has_no_fidelity_loss(teacher: nn.Module, probe: FidelityProbe):
    assert fidelity_loss(teacher, FAMILY, probe) == 0
    assert sum(len(chunk.velocity_BNC) for chunk in probe.chunks) == 4 * 3
    times = sorted({t for chunk in probe.chunks for t in chunk.inputs.timestep_B.tolist()})
    assert times == pytest.approx([1 / 6, 3 / 6, 5 / 6])


def test_fidelity_loss_is_the_mean_square_over_all_of_the_probe(
    teacher: nn.Module, probe: FidelityProbe
):
    student = assemble(teacher, plan_with(BlockPlan(span=(2, 4)))).train()
    squares = [
        (FAMILY.forward(student, chunk.inputs) - chunk.velocity_BNC).square().flatten()
        for chunk in probe.chunks
    ]
    expected = torch.cat(squares).double().mean().item()
    assert fidelity_loss(student, FAMILY, probe) == pytest.approx(expected, rel=1e-5)
    assert student.training


def test_damage_is_the_fidelity_of_the_teacher_with_one_replacement(
    teacher: nn.Module, probe: FidelityProbe
):
    config = dict(teacher.config)
    blocks = [BlockPlan(span=(0, 1)), BlockPlan(span=(2, 4)), BlockPlan(span=(5, 5), ffn=0.5)]
    made = {
        block: make_block(FAMILY, config, FAMILY.block_modules(teacher), block) for block in blocks
    }
    damages = replacement_damages(teacher, FAMILY, made, probe)
    for block in blocks:
        student = assemble(teacher, plan_with(block))
        assert damages[block] == pytest.approx(fidelity_loss(student, FAMILY, probe), rel=1e-4)
        assert damages[block] > 0


def test_the_probe_is_the_same_for_the_same_seed(teacher: nn.Module, probe: FidelityProbe):
    again = make_probe(teacher, FAMILY, small_latents(), CONFIG, seed=0)
    other = make_probe(teacher, FAMILY, small_latents(), CONFIG, seed=1)
    noisy = [
        torch.cat([chunk.inputs.noisy_BNC for chunk in p.chunks]) for p in (probe, again, other)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_large_pictures_pass_a_few_at_a_time_with_the_same_noise(
    teacher: nn.Module, probe: FidelityProbe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainers.passes.TOKENS", 2 * (16 + 6))
    store = open_store(str(tmp_path))
    source = SimpleNamespace(digest="t", family=FAMILY)
    for _ in range(2):  # made, then read
        found = shared_probe(
            store, cast("Any", source), teacher, small_latents(), "encoded/x", CONFIG, 0
        )
        assert {len(chunk.velocity_BNC) for chunk in found.chunks} == {1, 2}
        for name in ("noisy_BNC", "timestep_B"):
            whole, parts = (
                torch.cat([getattr(chunk.inputs, name) for chunk in p.chunks])
                for p in (probe, found)
            )
            assert torch.equal(parts, whole)
        velocities = [torch.cat([c.velocity_BNC for c in p.chunks]) for p in (found, probe)]
        torch.testing.assert_close(*velocities)


def test_nothing_held_out_is_refused(teacher: nn.Module):
    with pytest.raises(DataError, match="held_out"):
        make_probe(teacher, FAMILY, small_latents(held_out=0), CONFIG, seed=0)


def test_a_picture_depends_on_its_seed_and_not_on_its_neighbours(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(tiny_pipeline)
    captions = ["a red circle", "two crosses", "a blue square above a red circle"]
    together = generate(pipeline, captions, seed=3, steps=2, size=64)
    sizes = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(
        pipeline.vae, "decode", lambda z, **named: (sizes.append(len(z)), decode(z, **named))[1]
    )
    monkeypatch.setattr("trainers.evaluate.PIXELS_AT_ONCE", 64 * 64)
    apart = generate(pipeline, captions, seed=3, steps=2, size=64)
    assert sizes == [1, 1, 1]
    assert [picture.size for picture in together] == [(64, 64)] * 3
    for a, b in zip(together, apart, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_scores_are_shares_by_family_and_their_plain_mean():
    empty = Image.new("RGB", (64, 64), (245, 245, 245))
    right = Image.new("RGB", (64, 64), (245, 245, 245))
    right.paste((220, 40, 40), (20, 20, 44, 44))
    captions = ["a red square", "a red square", "two crosses"]
    scores = judge_scores([right, empty, empty], captions, TASKS["shapes"])
    assert scores == {"counting": 0.0, "colours": 0.5, "overall": 0.25}


def plan_with(block: BlockPlan) -> Plan:
    """The teacher's six blocks with one span replaced."""
    first, last = block.span
    alone = [BlockPlan(span=(i, i)) for i in range(6) if not first <= i <= last]
    blocks = sorted([*alone, block], key=lambda b: b.span)
    return Plan(family="qwen_image", teacher_blocks=6, blocks=tuple(blocks))
