"""A small invented sweep for the tests of the report and the model card."""

from __future__ import annotations

import dataclasses
import itertools

from PIL import Image

from search.features import plan_features
from search.report.data import (
    BudgetFacts,
    FinalistFacts,
    PictureRow,
    Provenance,
    Redundancy,
    ReportData,
    Scores,
    StageCost,
    StudentFacts,
    TeacherFacts,
    TrialFacts,
)
from trainers.schedule import Phase, Schedule
from trainers.students.plan import BlockPlan, Plan

BLOCKS = 6


def plan(*spans: tuple[int, int], narrow: tuple[int, int] | None = None) -> Plan:
    """A plan from the library; the span `narrow` keeps half of its FFNs."""
    blocks = tuple(
        BlockPlan(span=span, start="library", ffn=0.5 if span == narrow else 1.0) for span in spans
    )
    return Plan(family="qwen_image", teacher_blocks=BLOCKS, blocks=blocks)


HALF = plan((0, 0), (1, 2), (3, 5))
THIRD = plan((0, 2), (3, 5), narrow=(3, 5))
TEACHER = TeacherFacts("examples/miniature", "0123456789abcdef", 2_000_000, BLOCKS)
PROVENANCE = Provenance(
    "demo <1>", "2026-11-20T12:00:00Z", 0, "128 drawn shapes at 64 px", {"torch": "2.13.0"}
)
SCHEDULE = Schedule(
    phases=(
        Phase(loss="span", steps=60, lr=1e-3),
        Phase(loss="velocity", train="all", steps=180, lr=5e-4),
    )
)
TEACHER_SCORES = Scores({"counting": 0.9, "position": 1.0}, 0.95)
STUDENTS = (
    StudentFacts(
        "50pct", HALF, 1_000_000, 0.2, 0.03, "runs/best/50pct",
        Scores({"counting": 0.88, "position": 0.96}, 0.92),
    ),
    StudentFacts(
        "33pct", THIRD, 640_000, 0.4, 0.08, "s3://models/best/33pct",
        Scores({"counting": 0.5, "position": 0.88}, 0.69),
    ),
)  # fmt: skip
COSTS = (
    StageCost("encode", 12.0, 2, skipped=True),
    StageCost("library", 70.0, 2, note="9 replacements trained, 2 reused"),
)


def whole() -> ReportData:
    """A finished sweep with everything in it."""
    trials = (
        TrialFacts(0, 1_000_000, 0.2, 0.3, "exact", HALF, budget="50pct", damage=0.1),
        TrialFacts(1, 640_000, 0.4, 0.3, "uniform", THIRD, budget="33pct", damage=0.3),
        TrialFacts(2, 640_000, None, 0.3, "tpe", THIRD, "failed", "33pct", 0.5),
        TrialFacts(3, 900_000, 0.5, 0.3, "tpe", HALF, budget="50pct", damage=0.2),
    )
    matrix = tuple(tuple(1 - 0.05 * abs(i - j) for j in range(BLOCKS)) for i in range(BLOCKS))
    picture = Image.new("RGB", (64, 64), (220, 40, 40))
    return ReportData(
        provenance=PROVENANCE,
        teacher=TEACHER,
        budgets=(
            BudgetFacts("50pct", "50%", 1_000_000, "1,000,000 parameters"),
            BudgetFacts("33pct", "33%", 660_000, "660,000 parameters"),
        ),
        students=STUDENTS,
        trials=trials,
        pareto=(0, 1),
        redundancy=Redundancy(
            matrix, matrix, tuple((0.1 * (i + 1), 0.2) for i in range(BLOCKS)), ("early", "late")
        ),
        finalists=(
            FinalistFacts("50pct", 0, HALF, 10**6, SCHEDULE, 0.2, 0.03, 40.0, 0.92, chosen=True),
            FinalistFacts("50pct", 1, HALF, 10**6, SCHEDULE, 0.2, None, 8.0, state="failed"),
        ),
        teacher_scores=TEACHER_SCORES,
        pictures=(
            PictureRow(
                "a red circle & a blue square", 0, picture, {"50pct": picture, "33pct": picture},
                {"teacher": True, "50pct": True, "33pct": False},
            ),
        ),
        costs=COSTS,
        sampling={"height": 64, "width": 64, "num_inference_steps": 20},
    )  # fmt: skip


def partitions() -> list[Plan]:
    """Every plan over spans of at most three blocks: 24 of them."""
    cuts = itertools.product((True, False), repeat=BLOCKS - 1)
    found = []
    for cut in cuts:
        starts = [0, *(i + 1 for i, here in enumerate(cut) if here)]
        spans = list(zip(starts, [*(s - 1 for s in starts[1:]), BLOCKS - 1], strict=True))
        if all(last - first < 3 for first, last in spans):
            found.append(plan(*spans))
    return found


def long() -> ReportData:
    """A sweep with enough trials and recoveries to compare, all at 50%: merges that lie early are
    the best, and one length of the schedules' second phase."""
    made = partitions()
    trials = tuple(
        TrialFacts(
            number, 100_000 * len(plan.blocks), 0.1 + plan_features(plan)["merge depth"], 0.3,
            "tpe", plan, budget="50pct", damage=1.0 + number % 5,
        )
        for number, plan in enumerate(made)
    )  # fmt: skip
    finalists = tuple(
        FinalistFacts(
            "50pct", number, made[number], 10**6, lengthened(number), 0.2 + number / 100,
            None if number % 6 == 0 else 1 - number / 100, 40.0,
            state="stopped" if number % 6 == 0 else "complete",
            measured={0.25: 0.02 + abs(number % 6 - 2) / 100 + number / 1e4},
        )
        for number in range(24)
    )  # fmt: skip
    return dataclasses.replace(whole(), trials=trials, pareto=(0,), finalists=finalists)


def lengthened(number: int) -> Schedule:
    """SCHEDULE with another length of its second phase, and another rate without effect."""
    first, second = SCHEDULE.phases
    longer = second.model_copy(update={"steps": 100 + 20 * (number % 6), "lr": 1e-4 * (number + 1)})
    return Schedule(phases=(first, longer))
