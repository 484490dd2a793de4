"""A small invented sweep for the tests of the report and the model card."""

from __future__ import annotations

from PIL import Image

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
        budgets=(BudgetFacts("50pct", "50%", 1_000_000), BudgetFacts("33pct", "33%", 660_000)),
        students=STUDENTS,
        trials=trials,
        pareto=(0, 1),
        redundancy=Redundancy(
            matrix, matrix, tuple((0.1 * (i + 1), 0.2) for i in range(BLOCKS)), ("early", "late")
        ),
        finalists=(
            FinalistFacts("50pct", 0, HALF, SCHEDULE, 0.2, 0.03, 40.0, 0.92, chosen=True),
            FinalistFacts("50pct", 1, HALF, SCHEDULE, 0.2, None, 8.0, state="failed"),
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
