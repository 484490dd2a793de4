"""Analysis of the tiny teacher, and what it nominates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from search.analyse import AnalyseConfig, Analysis, load_analysis, nominate, save_analysis
from search.redundancy import analyse
from search.solver import Piece, smallest
from search.space import candidates
from storage.store import open_store
from tests.trainers.small import load_transformer, small_latents
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan, uniform_plan

FAMILY = FAMILIES["qwen_image"]
CONFIG = AnalyseConfig(pictures=4, bands=2, tokens=64, batch_size=5)
CANDIDATES = candidates(6, 3, (1.0, 0.5, "linear"), ("dual", "projected", "shared"))


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


@pytest.fixture(scope="module")
def analysis(teacher: nn.Module) -> Analysis:
    return analyse(teacher, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0)


def test_measures_every_block_band_and_candidate(analysis: Analysis) -> None:
    assert analysis.bands == ("0.5–1", "0–0.5")
    assert analysis.importance.shape == (6, 2)
    assert (analysis.importance > 0).all()
    assert set(analysis.damages) == set(CANDIDATES)
    for block, damage in analysis.damages.items():
        assert (damage == 0) == block.untouched
    for cka in (analysis.image_cka, analysis.text_cka):
        assert cka.shape == (6, 6)
        torch.testing.assert_close(cka, cka.T)
        torch.testing.assert_close(cka.diagonal(), torch.ones(6), atol=1e-4, rtol=0)
    for chain in (analysis.image_chain, analysis.text_chain):
        assert chain.shape == (6, 3)
        assert torch.isnan(chain).nonzero().tolist() == [[4, 2], [5, 1], [5, 2]]
        assert (chain[:, 0] == 1).all()


def test_batches_and_padding_do_not_change_the_damage(
    teacher: nn.Module, analysis: Analysis
) -> None:
    whole = CONFIG.model_copy(update={"batch_size": 8})
    again = analyse(teacher, FAMILY, small_latents(), CANDIDATES, whole, seed=0)
    # Noise is drawn batch by batch, so only the scale agrees.
    ratios = [again.damages[b] / d for b, d in analysis.damages.items() if d > 0]
    assert min(ratios) > 0.3
    assert max(ratios) < 3


def test_a_block_that_does_nothing_is_unimportant_and_free_to_merge(
    tiny_pipeline: Path,
) -> None:
    model = load_transformer(tiny_pipeline)
    idle = FAMILY.block_modules(model)[3]
    for name in ("img_mod", "txt_mod"):
        for parameter in getattr(idle, name).parameters():
            torch.nn.init.zeros_(parameter)
    found = analyse(model, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0)
    assert found.importance[3].max() < 1e-9
    pairs = {b.span: d for b, d in found.damages.items() if b.length == 2 and b.depth_only}
    assert min(pairs, key=pairs.__getitem__) == (2, 3)
    assert pairs[2, 3] < 1e-9


def test_is_stored_and_read_back(analysis: Analysis, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert load_analysis(store, "analysis/x") is None
    save_analysis(store, "analysis/x", analysis)
    again = load_analysis(store, "analysis/x")
    assert again is not None
    assert (again.bands, again.damages) == (analysis.bands, analysis.damages)
    torch.testing.assert_close(again.image_chain, analysis.image_chain, equal_nan=True)


@pytest.mark.parametrize("most", [1, 8, 1000])
def test_nominations_can_meet_every_budget(
    teacher: nn.Module, analysis: Analysis, most: int
) -> None:
    config = dict(teacher.config)
    outside = FAMILY.outside_parameters(config)
    sizes = {b: FAMILY.block_parameters(config, b) for b in CANDIDATES}
    own = sizes[BlockPlan(span=(0, 0))]
    limits = [outside + 3 * own, outside + 2 * own]
    starts = [uniform_plan("qwen_image", 6, blocks, start="library") for blocks in (3, 2)]
    chosen = nominate(analysis.damages, "qwen_image", config, limits, most, starts)
    assert len(set(chosen)) == len(chosen)
    assert not any(block.untouched for block in chosen)
    for blocks, limit in ((3, limits[0]), (2, limits[1])):
        uniform = uniform_plan("qwen_image", 6, blocks, start="library")
        assert set(uniform.blocks) <= set(chosen)
        pieces = {
            b: Piece(0, sizes[b]) for b in (*chosen, *(BlockPlan(span=(i, i)) for i in range(6)))
        }
        assert smallest(pieces, 6, outside) <= limit
    if most == 1000:
        # All but those that are too large for any plan within the limits.
        assert {b for b in CANDIDATES if b.length > 1} <= set(chosen)
    if most == 8:
        assert 5 <= len(chosen) <= 16
