"""Everything a report says, as one frozen record: the page is a function of it and nothing else.

Optional parts are empty or None where a sweep has none (no judge for this data, a stage not yet
run); the page then leaves their section out. Fidelity losses are mean squared differences of the
student's and the teacher's velocity; judge scores lie in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from search.objectives import DEFAULT
from search.ranks import rank_correlation

if TYPE_CHECKING:
    from PIL.Image import Image

    from search.budget import Currency
    from search.objectives import Scored
    from trainers.measure import Cost
    from trainers.schedule import Schedule
    from trainers.students.plan import Plan

State = Literal["complete", "stopped", "failed"]
"""A trial or finalist fails when its training or its score is not a number."""
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TeacherFacts:
    """The model that was compressed. `digest` is that of its transformer."""

    name: str
    digest: str
    parameters: int
    blocks: int
    cost: Cost | None = None
    """What a forward pass takes, where it was measured."""

    def amount(self, currency: Currency) -> int | None:
        """What it costs in one currency; None where that was not measured."""
        return _cost(self.parameters, self.cost, currency)


@dataclass(frozen=True)
class BudgetFacts:
    """A wanted size: `label` as in best/<label>, `asked` as the config wrote it."""

    label: str
    asked: str
    limit: int | None
    """What a student may cost; None while a budget of latency or memory has yet to be measured."""
    most: str = ""
    """The limit in words."""
    currency: Currency = "parameters"
    """Of the limit."""


@dataclass(frozen=True)
class TrialFacts:
    """One scored plan. `fidelity_loss` is None when the trial failed."""

    number: int
    parameters: int
    fidelity_loss: float | None
    seconds: float
    origin: str
    """Who proposed it, see search.proposals.Origin."""
    plan: Plan
    state: State = "complete"
    budget: str = ""
    """Label of the budget it was proposed for."""
    damage: float | None = None
    """Summed damage of its blocks, each alone in the teacher."""
    costs: Mapping[Currency, int] = field(default_factory=dict)
    """Memory and latency, where either was sought: as measured, or else as its blocks predict."""

    def amount(self, currency: Currency) -> int | None:
        """What it costs in one currency, if that is known."""
        return self.parameters if currency == "parameters" else self.costs.get(currency)


@dataclass(frozen=True)
class Redundancy:
    """What the analysis measured of the teacher; L blocks."""

    image_cka: Matrix
    """[L][L], linear CKA of the image stream's states after each pair of blocks."""
    text_cka: Matrix
    importance: Matrix
    """[L][bands], squared change of the velocity when that block's residual is left out."""
    bands: tuple[str, ...]
    """Names of the timestep bands, noisiest first."""


@dataclass(frozen=True)
class FinalistFacts:
    """One recovery: a plan distilled by one schedule. `loss_after` is None when it failed."""

    budget: str
    trial: int
    plan: Plan
    parameters: int
    schedule: Schedule
    loss_before: float
    loss_after: float | None
    seconds: float
    judge_score: float | None = None
    chosen: bool = False
    state: State = "complete"
    measured: Mapping[float, float] = field(default_factory=dict)
    """Fidelity loss on the way, by the part of the schedule after which it was measured."""
    cost: Cost | None = None
    """What a forward pass takes, where it was measured."""

    def amount(self, currency: Currency) -> int | None:
        """What it costs in one currency; None where that was not measured."""
        return _cost(self.parameters, self.cost, currency)

    @property
    def losses(self) -> dict[float, float]:
        """Fidelity loss by tier, ascending: 0 is the plan as assembled, 1 the end."""
        end = {} if self.loss_after is None else {1.0: self.loss_after}
        return dict(sorted({0.0: self.loss_before, **self.measured, **end}.items()))


@dataclass(frozen=True)
class TierPair:
    """What two tiers say of the same plans of a budget."""

    budget: str
    lower: float
    """A tier by its part of the schedule; 0 is the plan as assembled."""
    upper: float
    points: tuple[tuple[float, float], ...]
    """(fidelity loss at `lower`, at `upper`)"""
    spearman: float | None
    """Rank correlation; None with fewer than three points, or where one tier's are all alike."""


@dataclass(frozen=True)
class Scores:
    """What the task's judge says of a model's pictures: the share that shows what was asked."""

    families: Mapping[str, float]
    overall: float
    """Mean over families, each with equal weight."""


@dataclass(frozen=True)
class StudentFacts:
    """The published student of one budget."""

    budget: str
    plan: Plan
    parameters: int
    loss_before: float
    """Assembled from the library, before recovery."""
    loss_after: float
    url: str
    """Where its diffusers directory lies: a path or s3://…"""
    scores: Scores | None = None
    cost: Cost | None = None
    """What a forward pass takes, where it was measured."""

    def amount(self, currency: Currency) -> int | None:
        """What it costs in one currency; None where that was not measured."""
        return _cost(self.parameters, self.cost, currency)


@dataclass(frozen=True)
class PictureRow:
    """One caption drawn by the teacher and by every student from the same seed."""

    caption: str
    seed: int
    teacher: Image
    students: Mapping[str, Image]
    """By budget label."""
    passed: Mapping[str, bool] = field(default_factory=dict)
    """The judge's verdict by budget label, and by "teacher"; a missing one is not shown."""


@dataclass(frozen=True)
class StageCost:
    """What one stage took. `skipped`: its output was there already, from this or another sweep."""

    name: str
    seconds: float
    workers: int
    skipped: bool = False
    note: str = ""
    """What it did, in a few words: "30 replacements trained, 0 reused"."""


@dataclass(frozen=True)
class Provenance:
    """From what, when and with what a sweep's results were made."""

    sweep: str
    created: str
    """ISO 8601, UTC."""
    seed: int
    data: str
    """The training pictures in one line: source, number, size."""
    environment: Mapping[str, str]
    """Versions by package, and the machine."""


@dataclass(frozen=True)
class ReportData:
    """A whole sweep, as the page shows it."""

    provenance: Provenance
    teacher: TeacherFacts
    budgets: tuple[BudgetFacts, ...]
    students: tuple[StudentFacts, ...]
    trials: tuple[TrialFacts, ...] = ()
    objectives: tuple[Scored, ...] = DEFAULT
    """What the search lowered."""
    pareto: tuple[int, ...] = ()
    """Numbers of the trials that no other beats in all of them."""
    redundancy: Redundancy | None = None
    finalists: tuple[FinalistFacts, ...] = ()
    teacher_scores: Scores | None = None
    pictures: tuple[PictureRow, ...] = ()
    costs: tuple[StageCost, ...] = ()
    sampling: Mapping[str, int | float] = field(default_factory=dict)
    """Arguments of the pipeline call that drew the pictures: height, width, steps."""

    @property
    def seconds(self) -> float:
        """Wall time of the stages that this sweep ran itself."""
        return sum(cost.seconds for cost in self.costs if not cost.skipped)

    def asked(self, label: str) -> str:
        """A budget as the config wrote it ("50%"), for its label ("50pct")."""
        return next((budget.asked for budget in self.budgets if budget.label == label), label)


def _cost(parameters: int, measured: Cost | None, currency: Currency) -> int | None:
    if currency == "parameters":
        return parameters
    if measured is None:
        return None
    return measured.latency if currency == "latency" else measured.memory


def kept(student: Scores | None, teacher: Scores | None) -> float | None:
    """The part of the teacher's judge score that a student keeps; None without both scores."""
    if student is None or teacher is None or teacher.overall == 0:
        return None
    return student.overall / teacher.overall


def tier_pairs(finalists: Sequence[FinalistFacts]) -> list[TierPair]:
    """Every two tiers that some finalist reached both of, budget by budget.

    Finalists of one plan that share their lower loss, as those do that only differ in schedule
    after it, are one point: the best that came of them.
    """
    pairs = []
    tiers = sorted({tier for each in finalists for tier in each.losses})
    for lower, upper in itertools.combinations(tiers, 2):
        for budget in dict.fromkeys(each.budget for each in finalists):
            best: dict[tuple[str, float], float] = {}
            for each in finalists:
                if each.budget == budget and {lower, upper} <= set(each.losses):
                    start, end = (each.plan.digest, each.losses[lower]), each.losses[upper]
                    best[start] = min(end, best.get(start, end))
            points = tuple((before, after) for (_, before), after in best.items())
            if points:
                rho = rank_correlation(*zip(*points, strict=True))
                pairs.append(TierPair(budget, lower, upper, points, rho))
    return pairs
