"""The comparison of searches: that it counts all costs, and only students that are as good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.rival.baseline import WIDTHS, drawn_plan, rungs
from benchmarks.rival.compare import cheapest, compare, ours_at, rival_at
from cluster.configfile import load_config
from search.config import SweepConfig
from trainers.students.counts import plan_parameters
from trainers.students.families import family_named

ROOT = Path(__file__).parents[2]
OURS: dict[str, Any] = {
    "analysis_cpu": 1.0,
    "library_cpu": 9.0,
    "trials": [
        {"cpu": 1.0, "best": 0.2, "plan": "a"},
        {"cpu": 2.0, "best": 0.1, "plan": "b"},
    ],
    "recoveries": {
        "a": [{"steps": 10, "cpu": 8.0, "judge": 0.3, "fidelity": 0.4}],
        "b": [
            {"steps": 5, "cpu": 4.0, "judge": 0.7, "fidelity": 0.05},
            {"steps": 10, "cpu": 8.0, "judge": 0.9, "fidelity": 0.02},
        ],
    },
}


def mark(order: int, steps: int, cpu: float, fidelity: float, judge: float | None) -> Any:
    return {"order": order, "steps": steps, "cpu": cpu, "fidelity": fidelity, "judge": judge}


RIVAL: dict[str, Any] = {
    "steps": 90,
    "wall_s": 100.0,
    "trials": [
        [mark(0, 30, 50.0, 0.3, None), mark(0, 90, 150.0, 0.05, 0.6)],
        [mark(1, 30, 50.0, 0.4, None)],
        [mark(2, 30, 50.0, 0.2, None), mark(2, 90, 160.0, 0.04, 0.8)],
    ],
}


def test_a_search_pays_for_the_trials_that_were_stopped() -> None:
    assert rival_at(RIVAL, 2) == (200.0, (200.0, 0.05, 0.6))
    assert rival_at(RIVAL, 3) == (360.0, (360.0, 0.04, 0.8))


def test_our_students_cost_everything_before_them() -> None:
    assert [tuple(reached) for reached in ours_at(OURS, 9)] == [
        (16.0, 0.05, 0.7),
        (20.0, 0.02, 0.9),
    ]


def test_only_a_student_as_good_in_both_counts_as_reaching() -> None:
    mine = ours_at(OURS, 2)
    assert cheapest(mine, 0.05, 0.6) == mine[0]
    assert cheapest(mine, 0.05, 0.8) == mine[1]
    assert cheapest(mine, 0.01, 0.1) is None
    (row,) = compare(OURS, RIVAL)["rows"]
    assert row["to_reach"] == pytest.approx(360 / 20)
    assert row["in_all"] == pytest.approx(360 / 20)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_rival_s_proposals_use_the_budget(width: float) -> None:
    family = family_named("qwen_image")
    config = family.published | {"num_layers": 16}
    whole = family.outside_parameters(config) + 16 * family.block_parameters(
        config, drawn_plan(family, config, 10**15, _drawn(1.0)).blocks[0]
    )
    limit = whole // 2
    plan = drawn_plan(family, config, limit, _drawn(width))
    found = plan_parameters(plan, config)
    assert found <= limit
    assert plan.blocks[0].span[0] == 0
    assert [block.span[0] for block in plan.blocks] == list(range(len(plan.blocks)))
    assert found > 0.4 * whole


def _drawn(width: float) -> dict[str, float]:
    return {"ffn": width} | {f"keep_{i}": 1 - i / 16 for i in range(1, 15)} | {"keep_15": 0.0}


def test_rungs_end_with_the_last_step() -> None:
    assert rungs(200) == [22, 66, 200]
    assert rungs(20) == [20]


def test_our_half_reads_what_the_demo_has_encoded() -> None:
    """`make bench-search` comes after `make demo`."""
    files = (ROOT / "benchmarks/rival/half.yaml", ROOT / "examples/miniature.yaml")
    half, demo = (load_config(file, [], SweepConfig) for file in files)
    assert (half.teacher, half.data, half.seed) == (demo.teacher, demo.data, demo.seed)
