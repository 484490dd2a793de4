"""The study's own logic on the tiny teacher: every method gives a student of its budget, and the
tables say what the rows say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.study import masks
from benchmarks.study.methods import ABLATIONS, CHAINS, METHODS, Case, Method, needed
from benchmarks.study.report import interval, main_table
from benchmarks.study.run import first_student, share_streams
from benchmarks.study.setting import Setting, Trained, train_library
from search.analyse import AnalyseConfig
from search.config import SweepConfig
from search.redundancy import analyse
from search.space import candidates
from search.sweep import open_sweep
from tests.trainers.small import small_latents
from trainers.data.latents import make_inputs
from trainers.evaluate import fidelity_loss, make_probe
from trainers.flow import velocity_target
from trainers.losses import velocity_loss
from trainers.probe import ProbeConfig
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan

BLOCKS = 6
EVERY = (*METHODS, *ABLATIONS)


@pytest.fixture(scope="module")
def setting(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    config = SweepConfig.model_validate(
        {
            "name": "study",
            "teacher": str(tiny_pipeline),
            "storage": str(tmp_path_factory.mktemp("store")),
            "budgets": ["60%"],
            "library": {"steps": 2, "batch_size": 4, "max_span": 4, "fit_batches": 1},
            "data": {"pictures": 8, "held_out": 2, "resolution": 64},
        }
    )
    made = Setting(open_sweep(config), small_latents(), per_family=1)
    small = ProbeConfig(pictures=2, timesteps=2)
    made.probe = make_probe(made.teacher, made.family, made.latents, small, 0)
    return made


@pytest.fixture(scope="module")
def case(setting: Setting) -> Case:
    offered = candidates(BLOCKS, 4, (1.0, 0.5))
    analysis = analyse(
        setting.teacher,
        setting.family,
        setting.latents,
        offered,
        AnalyseConfig(pictures=2, bands=2, tokens=32),
        0,
    )
    limit = int(0.7 * setting.sweep.teacher_parameters)
    return Case(setting, setting.ground(analysis), limit, seed=1)


@pytest.fixture(scope="module")
def trained(case: Case) -> dict[str, Trained]:
    wanted = needed(case, (*EVERY, *CHAINS))
    spans = [BlockPlan(span=(i, i + 1), start="library") for i in range(BLOCKS - 1)]
    wanted["middle"] += spans
    return {
        start: train_library(case.setting, list(dict.fromkeys(blocks)), 0, start)
        for start, blocks in wanted.items()
    }


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_a_method_gives_a_student_within_the_budget(
    method: Method, case: Case, trained: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "STEPS", 2)
    library = trained.get(method.start, Trained({}, {}, {}))
    plan = method.choose(case, library) if method.choose else method.plan(case)
    assert plan is not None
    assert plan_parameters(plan, case.setting.config) <= case.limit
    student = first_student(case.setting, plan, method, library, seed=0)
    assert math.isfinite(fidelity_loss(student, case.setting.family, case.setting.probe))


def test_a_chain_shares_streams_until_it_fits(case: Case, trained: dict[str, Trained]) -> None:
    (method,) = CHAINS
    plan = method.plan(case)
    assert plan is not None
    half = first_student(case.setting, plan, method, trained["average"], seed=0)
    smaller = replace(case, limit=plan_parameters(plan, case.setting.config) - 1)
    whole, student = share_streams(smaller, plan, half)
    assert [b.text for b in whole.blocks] == ["dual"] * (len(whole.blocks) - 1) + ["shared"]
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == plan_parameters(whole, case.setting.config) <= smaller.limit


def test_a_learned_mask_keeps_as_many_as_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "STEPS", 2)
    before = {k: v.clone() for k, v in case.setting.teacher.state_dict().items()}
    for count in (1, 3, 4, 6):
        kept = masks.learn_mask(case, count)
        assert len(set(kept)) == count
        assert kept == sorted(kept)
    assert all(torch.equal(before[k], v) for k, v in case.setting.teacher.state_dict().items())


def test_the_diffusion_loss_is_the_distance_from_noise_minus_clean(setting: Setting) -> None:
    found = setting.diffusion(setting.teacher)
    pictures = setting.latents.held_out[:2]
    clean = setting.latents.batch(pictures).clean_BNC
    losses = []
    for chunk in setting.probe.chunks:
        t = chunk.inputs.timestep_B[0]
        noise = (chunk.inputs.noisy_BNC - (1 - t) * clean) / t
        again = make_inputs(setting.latents.batch(pictures), chunk.inputs.timestep_B, noise)
        torch.testing.assert_close(again.noisy_BNC, chunk.inputs.noisy_BNC)
        losses.append(float(velocity_loss(chunk.velocity_BNC, velocity_target(clean, noise))))
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_tables_give_the_mean_and_its_interval() -> None:
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert interval([1.5], 1) == "1.5"
    row = {
        "method": "uniform", "reached": True, "parameters": 1000, "blocks": 3,
        "fidelity_before": 0.5, "fidelity": 0.1, "diffusion": 0.4, "judge": {"overall": 0.75},
        "latency_ms": 2.0, "analysis_s": 1, "search_s": 2, "library_s": 3, "recovery_s": 4,
    }  # fmt: skip
    table = main_table(METHODS[:2], [row, {"method": "random", "reached": False}])
    assert "| uniform | 1,000 | 3 | 0.500 | 0.1000 | 0.400 | 0.750 | 2.0 | 10 |" in table
    assert "| random | does not reach it |" in table
