"""Analysis of the tiny teacher, and what it nominates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from search.analyse import AnalyseConfig, Analysis, load_analysis, nominate, save_analysis
from search.budget import Target
from search.config import SweepConfig
from search.effects import probed
from search.redundancy import Measurer, analyse
from search.solver import Piece, smallest
from search.space import candidates
from search.stages import stage_named
from search.sweep import open_sweep
from storage.store import open_store
from tests.trainers.small import load_transformer, padded, small_latents
from trainers import passes
from trainers.data.latents import Latents, make_inputs
from trainers.progress import silent
from trainers.students.families import FAMILIES
from trainers.students.families.base import State
from trainers.students.plan import BlockPlan, Start, uniform_plan

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


def test_batches_change_the_damage_by_no_more_than_their_noise(
    teacher: nn.Module, analysis: Analysis
) -> None:
    whole = CONFIG.model_copy(update={"batch_size": 8})
    again = analyse(teacher, FAMILY, small_latents(), CANDIDATES, whole, seed=0)
    # Noise is drawn batch by batch, so only the scale agrees.
    ratios = [again.damages[b] / d for b, d in analysis.damages.items() if d > 0]
    assert min(ratios) > 0.3
    assert max(ratios) < 3


def test_padding_does_not_change_the_analysis(
    teacher: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, batch = small_latents(), Latents.batch
    monkeypatch.setattr(Latents, "batch", lambda *which: padded(batch(*which)))
    found = analyse(teacher, FAMILY, latents, CANDIDATES, CONFIG, seed=0)
    same_analysis(found, analysis)


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
@pytest.mark.parametrize("rules", [True, False], ids=["with the rules", "alone"])
def test_nominations_can_meet_every_budget(
    teacher: nn.Module, analysis: Analysis, most: int, rules: bool
) -> None:
    config = dict(teacher.config)
    outside = FAMILY.outside_parameters(config)
    own = [BlockPlan(span=(i, i)) for i in range(6)]
    sizes = {b: FAMILY.block_parameters(config, b) for b in (*CANDIDATES, *own)}
    limits = {blocks: outside + blocks * sizes[own[0]] for blocks in (3, 2)}
    targets = [Target(str(limit), limit) for limit in limits.values()]
    starts = [uniform_plan("qwen_image", 6, blocks, start="library") for blocks in limits]
    given = starts if rules else []
    chosen = nominate(analysis.damages, "qwen_image", config, targets, most, given)
    assert len(set(chosen)) == len(chosen)
    assert not any(block.untouched for block in chosen)
    pieces = {block: Piece(0, sizes[block]) for block in (*chosen, *own)}
    for limit in limits.values():
        assert smallest(pieces, 6, outside) <= limit
    for plan in given:
        assert set(plan.blocks) <= set(chosen)
    if most == 1000:
        # All but those that are too large for any plan within the limits.
        assert {b for b in CANDIDATES if b.length > 1} <= set(chosen)
    if most == 8:
        assert 5 <= len(chosen) <= 16


def test_what_is_nominated_is_offered_with_every_start(
    teacher: nn.Module, analysis: Analysis
) -> None:
    config = dict(teacher.config)
    size = FAMILY.block_parameters(config, BlockPlan(span=(0, 0)))
    target = Target("half", FAMILY.outside_parameters(config) + 3 * size)
    rule = uniform_plan("qwen_image", 6, 3, start="library")

    def nominated(*starts: Start) -> list[BlockPlan]:
        return nominate(analysis.damages, "qwen_image", config, [target], 30, [rule], starts=starts)

    trained, both = nominated("library"), nominated("average", "library")
    assert len(trained) >= 30
    assert {block for block in both if block.start == "library"} == set(trained)
    # Maps are not cut from the teacher.
    cut = [b for b in trained if b.ffn != "linear" and b.text != "projected"]
    assert 0 < len(cut) < len(trained)
    assert len(both) == len(set(both)) == len(trained) + len(cut)

    untrained = [block for block in nominated("average") if block not in rule.blocks]
    assert len(untrained) == 30
    assert all(block.untrained for block in untrained)


def test_a_spans_damage_follows_that_of_its_whole_chain(
    teacher: nn.Module, analysis: Analysis
) -> None:
    """Against the formula written out: every chain of probes put in the place of its blocks."""
    alone = Measurer(teacher, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0)
    alone.gather()
    solved = [alone.solve(i, alone.take(i)) for i in range(6)]
    probes = {key: weight for one in solved for key, weight in one.probes.items()}
    batch = small_latents().batch(small_latents().training[:4])
    noise = torch.randn(batch.clean_BNC.shape, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(batch, torch.full((4,), 0.6), noise)
    blocks = FAMILY.block_modules(teacher)

    def velocity(first: int, last: int) -> torch.Tensor:
        state, context = FAMILY.begin(teacher, inputs)
        for i, block in enumerate(blocks):
            if first < i <= last:
                state = State(
                    probed(state.text_BMD, probes[i, "text"]),
                    probed(state.image_BND, probes[i, "image"]),
                )
            else:
                state = FAMILY.run_block(block, state, context)
        return FAMILY.end(teacher, state, context)

    with torch.no_grad():
        whole = velocity(0, 0)
        merged = [b for b in CANDIDATES if b.length > 1 and b.depth_only]
        chained = [float((velocity(*b.span) - whole).square().mean()) for b in merged]
    estimated = [analysis.damages[block] for block in merged]
    assert spearmanr(chained, estimated).statistic > 0.8


def test_workers_that_share_the_pictures_find_what_one_finds(
    teacher: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "TOKENS", 1)
    parts = [
        Measurer(teacher, FAMILY, small_latents(), CANDIDATES, CONFIG, seed=0, part=i, parts=4)
        for i in range(4)
    ]
    for part in parts:
        part.gather()
    solved = [parts[i % 4].solve(i, *(part.take(i) for part in parts)) for i in range(6)]
    effects = [part.effects(*solved) for part in parts]
    assert [int(part.pictures.sum()) for part in effects] == [2, 2, 2, 2]  # of two batches
    shared = parts[2].conclude(solved, effects, [part.samples() for part in parts])
    same_analysis(shared, analysis)
    assert not any(part.take(0).probes for part in parts)


@pytest.mark.usefixtures("ray")
def test_ray_workers_find_what_one_process_finds(tiny_pipeline: Path, tmp_path: Path) -> None:
    sweeps = []
    for workers in (1, 4):
        config = SweepConfig.model_validate(
            {
                "name": "tiny",
                "teacher": str(tiny_pipeline),
                "storage": str(tmp_path / f"runs{workers}"),
                "budgets": ["60%"],
                "data": {"source": "shapes", "pictures": 24, "held_out": 4, "resolution": 64},
                "analyse": {**CONFIG.model_dump(), "workers": workers},
                "library": {"max_span": 3},
            }
        )
        sweep = open_sweep(config)
        stage_named("encode").run(sweep, silent())
        assert stage_named("analyse").needs_cluster(sweep) == (workers > 1)
        assert stage_named("analyse").spread(sweep) == workers
        stage_named("analyse").run(sweep, silent())
        sweeps.append(sweep)
    found = [load_analysis(sweep.store, sweep.analysis_prefix) for sweep in sweeps]
    assert sweeps[0].analysis_prefix == sweeps[1].analysis_prefix
    assert found[0] is not None
    assert found[1] is not None
    same_analysis(found[1], found[0])


def same_analysis(ours: Analysis, theirs: Analysis, within: float = 1e-6) -> None:
    """As far as float32 allows."""
    assert (ours.bands, ours.ridged) == (theirs.bands, theirs.ridged)
    for name in (
        "importance",
        "influence",
        "ffn_error",
        "image_cka",
        "text_cka",
        "image_chain",
        "text_chain",
    ):
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=within, atol=within, equal_nan=True
        )
    for block, damage in theirs.damages.items():
        assert ours.damages[block] == pytest.approx(damage, rel=within, abs=within)
