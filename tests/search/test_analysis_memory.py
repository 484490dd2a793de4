"""What the analysis holds, on the teacher's device and beside it; how batches pass is not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import DeviceMemory, PeakMemory
from search.analyse import AnalyseConfig
from search.effects import Effects, measure
from search.redundancy import Measurer, analyse, wanted_maps
from search.space import candidates
from search.statistics import STREAMS, Statistics, gather, memory
from tests.search.test_redundancy import CANDIDATES, CONFIG, same_analysis
from tests.trainers.small import load_transformer, small_latents
from tests.trainers.students.tiny import QWEN_IMAGE
from trainers import passes
from trainers.estimate import GPUS, USED, Pictures, passing_memory
from trainers.students.counts import plan_parameters
from trainers.students.families import FAMILIES
from trainers.students.families.base import Inputs
from trainers.students.plan import identity_plan

FAMILY = FAMILIES["qwen_image"]
WIDTH = FAMILY.width(FAMILY.published)
WANTED = wanted_maps(FAMILY, FAMILY.published, candidates(60, 2, (1.0, "linear"), ("dual",)))
TEXT = 256
"""Tokens of a long caption."""


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU, where no scores are kept; without one, torch writes them out."""

    def attention(query: Tensor, *_: object, **__: object) -> Tensor:
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def real(blocks: int) -> nn.Module:
    """The first blocks of Qwen-Image, on a device that is not there."""
    config = {**FAMILY.published, "num_layers": blocks}
    plan = identity_plan(FAMILY.name, blocks)
    return FAMILY.build(config, plan, "meta", torch.bfloat16).requires_grad_(False)


def pictures(count: int, resolution: int) -> Inputs:
    side = resolution // 16
    made = [(count, side * side, 64), (count,), (count, TEXT, 3584)]
    noisy, times, embeds = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in made)
    return Inputs(noisy, times, embeds, None, (side, side))


def gathering(teacher: nn.Module, inputs: Inputs) -> int:
    """The most bytes on the device at a time, weights apart."""
    with DeviceMemory() as held:
        gather(Statistics(), teacher, FAMILY, inputs, 0, WANTED, 1024, 0)
    return held.peak


def measuring(teacher: nn.Module, inputs: Inputs) -> int:
    blocks, count = len(FAMILY.block_modules(teacher)), len(inputs.noisy_BNC)
    effects = Effects.none(blocks, 1, [])
    probes = {
        (i, name): torch.zeros(1, 1).expand(WIDTH, WIDTH) for i in range(blocks) for name in STREAMS
    }
    bands_B = torch.zeros(count, dtype=torch.long)
    with DeviceMemory() as held:
        for rows in passes.passes(inputs):
            measure(effects, teacher, FAMILY, inputs.rows(rows), bands_B[rows], probes, {})
    return held.peak


@pytest.mark.usefixtures("fused")
def test_qwen_image_is_analysed_on_a_gpu_of_80_gb() -> None:
    whole = identity_plan(FAMILY.name, FAMILY.blocks(FAMILY.published))
    weights = 2 * plan_parameters(whole, FAMILY.published)
    batch = AnalyseConfig().batch_size
    inputs = pictures(batch, 1328)
    given = sum(t.nbytes for t in (inputs.noisy_BNC, inputs.embeds_BMD))
    image = inputs.noisy_BNC.shape[1]
    most = passing_memory(FAMILY, FAMILY.published, 1, Pictures(passes.TOKENS, 0))

    gathered = gathering(real(3), inputs)
    state = 2 * (image + 2 * TEXT) * WIDTH  # of a picture; text also modulated
    sums = (2 + len(WANTED[1])) * 2 * WIDTH**2 * 8  # of one block
    assert gathered < given + batch * state + most + sums
    # Beside the pass the state before the block, and the changed one of the last.
    assert measuring(real(4), inputs.rows(slice(0, 8))) < given + 2 * 4 * state + most
    assert weights + gathered < 0.7 * USED * GPUS["H100-80GB"].gib * 2**30


@pytest.mark.usefixtures("fused")
def test_the_device_holds_no_more_for_more_blocks_or_more_pictures() -> None:
    seven, more = pictures(7, 1024), pictures(21, 1024)
    assert gathering(real(3), seven) == gathering(real(5), seven)
    assert measuring(real(4), seven) == measuring(real(6), seven)
    given = more.noisy_BNC.nbytes + more.embeds_BMD.nbytes
    assert measuring(real(4), more) - measuring(real(4), seven) < given


def test_sums_of_more_batches_take_no_second_set() -> None:
    config = {
        **QWEN_IMAGE.config, "attention_head_dim": 32, "num_attention_heads": 4,
        "axes_dims_rope": [8, 12, 12], "joint_attention_dim": 64,
    }  # fmt: skip
    teacher = replace(QWEN_IMAGE, config=config).model()
    for batch_size in (4, 2, 1):
        settings = AnalyseConfig(pictures=4, bands=1, tokens=16, batch_size=batch_size)
        alone = Measurer(teacher, FAMILY, small_latents(), CANDIDATES, settings, seed=0)
        with PeakMemory() as held:
            alone.gather()
        sums = memory(config, FAMILY, wanted_maps(FAMILY, config, CANDIDATES), settings.tokens)
        assert held.peak < 1.3 * sums


def test_how_a_batch_passes_does_not_show(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures at a time, and one; whole batches are what other tests see."""
    teacher = load_transformer(tiny_pipeline)
    whole = analyse(teacher, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0)
    for tokens in (45, 1):
        monkeypatch.setattr(passes, "TOKENS", tokens)
        parts = analyse(teacher, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0)
        same_analysis(parts, whole, 1e-4)


def test_a_batch_passes_whole_or_in_parts_of_one_size() -> None:
    few = Inputs(torch.zeros(5, 16, 64), torch.zeros(5), torch.zeros(5, 6, 64), None, (4, 4))
    assert passes.passes(few) == [slice(0, 5)]
    large = [rows.stop - rows.start for rows in passes.passes(pictures(64, 1024))]
    assert (sum(large), max(large), min(large)) == (64, 7, 6)
    assert len(passes.passes(pictures(3, 4096))) == 3
