"""Which plan to score next: the known starting points, then in turn what the scored plans teach
the exact solver (search/surrogate.py) and what Optuna proposes.

Deterministic: trial n is proposed from the seed and from the results of the trials up to
n − `lag`, told in order of number, and from nothing else. Results that arrive early wait. So the
order in which workers finish does not matter, and a search that was cut off proposes again what it
proposed before: its stored results are told as if they had just arrived.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from search.budget import Currency, Target
from search.objectives import DEFAULT, Scored
from search.samplers import GENETIC, Sampler, make_sampler
from search.space import Space
from search.surrogate import Surrogate
from trainers.students.plan import Plan

if TYPE_CHECKING:
    import optuna

Origin = (
    Literal["exact", "corrected", "uniform", "ppcl", "amber", "influence", "earlier", "given"]
    | Sampler
)
"""Who proposed a plan: the exact solver by the pieces' own damages or by corrected ones, a rule
(search/rules.py), an earlier sweep, the user, or a sampler."""

_REMEMBERED = 128
"""Trials of a study that its sampler keeps, when there are twice as many: half of them the best,
half the latest. What a proposal takes in time and memory then stays the same however many there
have been."""

_CORRECTED = 4
"""Best plans by corrected damages among which a new one is looked for."""

_STEPS_AWAY = 8
"""Points tried, ever farther from the one that Optuna drew, while they only give plans that were
seen; then the solver's own order of plans is followed."""


Start = tuple[str, Origin, Plan]
"""A plan to score early, with the label of its budget and who proposed it."""


@dataclass(frozen=True)
class Proposal:
    """A plan to score."""

    number: int
    budget: str
    """Label of the budget it is made for."""
    origin: Origin
    plan: Plan
    expected: float | None
    """Its fidelity loss by the surrogate, as far as results were known; None before any were."""


class Proposals:
    """Proposals for one search, each plan at most once.

    After the starting points, the budgets take turns, each with an Optuna study of its own: what
    makes a good plan at one size says little about another. A plan that turns out to cost more than
    its budget is told as one that breaks a constraint; and what plans cost more than predicted, on
    median, is left free by those after them.
    """

    def __init__(
        self,
        space: Space,
        targets: Sequence[Target],
        *,
        trials: int,
        exact: int,
        lag: int,
        seed: int,
        plans: Sequence[Start] = (),
        sampler: Sampler = "tpe",
        objectives: Sequence[Scored] = DEFAULT,
    ) -> None:
        """`exact`: how many of the solver's best plans a budget starts with, beside those of
        `plans` that the space holds and the budget allows."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._targets = list(targets)
        self._lag = lag
        self._seed = seed
        self._sampler: Sampler = sampler
        self._total = trials
        self._objectives = tuple(objectives)
        self._distributions = dict.fromkeys(
            space.names, optuna.distributions.FloatDistribution(0.0, 1.0)
        )
        self._loss_at = self._objectives.index("fidelity_loss")
        self.studies = {
            target.label: optuna.create_study(directions=["minimize"] * len(objectives))
            for target in targets
        }
        self._surrogates = {
            target.label: Surrogate(space.within(target.currency).pieces) for target in targets
        }
        self._drawn_last = dict.fromkeys(self.studies, False)
        self._starts = self._starting_points(exact, plans)
        self._count = 0
        """How many plans were proposed."""
        self._asked: dict[int, Proposal] = {}
        """Those whose results the studies were not told yet; a long search forgets the others here,
        so that it does not grow."""
        self._drawn: dict[int, Mapping[str, Any]] = {}
        """What a sampler noted at the trials it drew, such as their generation."""
        self._seen: set[str] = set()
        self._results: dict[int, tuple[float, Mapping[Currency, int]]] = {}
        """That were not told yet."""
        self._dearer: dict[str, list[float]] = {target.label: [] for target in targets}
        """Measured cost over predicted cost, of the plans told so far."""
        self._told = 0
        self._first_unknown = 0
        """The first proposal that has no result yet."""
        self._orders: dict[tuple[str, int], Iterator[Plan]] = {}
        """By budget and room, the plans in the solver's order, as far as they were looked at."""
        self._exhausted: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to propose."""
        every_plan_seen = len(self._exhausted) == len(self._targets)
        return self._count >= self._total or every_plan_seen

    def next(self) -> Proposal | None:
        """The next proposal; None while it waits for results, and when `finished`."""
        number = self._count
        while self._first_unknown in self._results:
            self._first_unknown += 1
        if self.finished or self._first_unknown <= number - self._lag:
            return None
        self._tell_until(number - self._lag)
        if number < len(self._starts):
            budget, origin, plan = self._starts[number]
            return self._proposed(budget, origin, plan)
        turn = (number - len(self._starts)) % len(self._targets)
        for target in self._targets[turn:] + self._targets[:turn]:
            if target.label not in self._exhausted:
                proposal = self._propose(target)
                if proposal:
                    return proposal
                self._exhausted.add(target.label)
        return None

    def tell(
        self,
        number: int,
        fidelity_loss: float | None,
        measured: Mapping[Currency, int] | None = None,
    ) -> None:
        """The result of a proposal, None or NaN when it failed; and what its student costs where
        that was measured."""
        loss = math.nan if fidelity_loss is None else fidelity_loss
        self._results[number] = (loss, measured or {})

    def _starting_points(self, exact: int, plans: Sequence[Start]) -> list[Start]:
        """The best few exact plans and the given ones of each budget, budgets in turn."""
        columns: list[list[Start]] = []
        for target in self._targets:
            best: list[Start] = [
                (target.label, "exact", plan)
                for plan in (self._exact(target, exact) if exact else ())
            ]
            others = [
                start
                for start in plans
                if start[0] == target.label
                and self._space.holds(start[2])
                and self._space.within(target.currency).cost(start[2]) <= target.limit
            ]
            columns.append([*best[:1], *others, *best[1:]])
        starts: list[Start] = []
        for row in range(max(map(len, columns))):
            starts += [column[row] for column in columns if row < len(column)]
        unique = {plan.digest: (budget, origin, plan) for budget, origin, plan in reversed(starts)}
        return list(reversed(unique.values()))

    def _exact(self, target: Target, count: int) -> list[Plan]:
        return self._space.within(target.currency).exact(target.room, count)

    def _room(self, target: Target) -> int:
        """What the next plan may be predicted to cost; never less than some plan does."""
        ratios = self._dearer[target.label]
        if not ratios:
            return target.room
        dearer = max(1.0, statistics.median([1.0, *ratios]))
        return max(self._space.within(target.currency).smallest, math.floor(target.room / dearer))

    def _propose(self, target: Target) -> Proposal | None:
        """A plan not seen before within the target's limit; None when there is none left."""
        drawn_last = self._drawn_last[target.label]
        self._drawn_last[target.label] = not drawn_last
        corrected = self._corrected(target) if drawn_last else None
        return corrected or self._draw(target)

    def _corrected(self, target: Target) -> Proposal | None:
        """The first of the best few plans by corrected damages that was not seen before."""
        corrected = self._surrogates[target.label].pieces()
        space = replace(self._space.within(target.currency), pieces=corrected)
        for plan in space.exact(self._room(target), _CORRECTED):
            if plan.digest not in self._seen:
                return self._proposed(target.label, "corrected", plan)
        return None

    def _draw(self, target: Target) -> Proposal | None:
        """Optuna's proposal, or what lies near it or next in the solver's order."""
        import optuna

        study = self.studies[target.label]
        seed = (self._seed * 1_000_003 + self._count) % 2**32
        told = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        study.sampler = make_sampler(
            self._sampler, seed, space=self._distributions if told else None
        )
        trial = study.ask()
        drawn = self._space.suggest(trial)
        space, room = self._space.within(target.currency), self._room(target)
        # The study learns plans, not points: many points give the same plan.
        asked = study.tell(trial, state=optuna.trial.TrialState.FAIL)
        rng = random.Random(seed)
        for step in range(_STEPS_AWAY):
            near = {name: _moved(hold, rng, step / _STEPS_AWAY) for name, hold in drawn.items()}
            plan = next(space.plans(near, room))
            if plan.digest not in self._seen:
                self._drawn[self._count] = asked.system_attrs
                return self._proposed(target.label, self._sampler, plan)
        order = space.plans(dict.fromkeys(space.names, 0.0), room)
        for plan in self._orders.setdefault((target.label, room), order):
            if plan.digest not in self._seen:
                return self._proposed(target.label, "exact", plan)
        return None

    def _proposed(self, budget: str, origin: Origin, plan: Plan) -> Proposal:
        expected = self._surrogates[budget].damage(plan)
        proposal = Proposal(self._count, budget, origin, plan, expected)
        self._asked[proposal.number] = proposal
        self._count += 1
        self._seen.add(plan.digest)
        return proposal

    def _tell_until(self, last: int) -> None:
        import optuna

        while self._told <= last:
            proposal, (loss, measured) = self._asked.pop(self._told), self._results.pop(self._told)
            noted = self._drawn.pop(self._told, {})
            self._told += 1
            target = next(t for t in self._targets if t.label == proposal.budget)
            cost = measured.get(target.currency)
            if cost is not None:
                predicted = self._space.within(target.currency).cost(proposal.plan)
                self._dearer[target.label].append(cost / predicted)
            if not math.isfinite(loss):
                continue
            study = self.studies[proposal.budget]
            if not noted and self._sampler in GENETIC:
                noted = self._generation(study)
            result = optuna.trial.create_trial(
                params=dict(self._space.encode(proposal.plan)),
                distributions=self._distributions,
                values=[
                    loss
                    if o == "fidelity_loss"
                    else measured.get(o, self._space.within(o).cost(proposal.plan))
                    for o in self._objectives
                ],
                constraints=None if cost is None else {target.currency: target.over(cost)},
                system_attrs=dict(noted),
            )
            study.add_trial(result)
            self.studies[proposal.budget] = _shortened(study, self._loss_at)
            if loss > 0:
                self._surrogates[proposal.budget].learn(proposal.plan, loss)

    def _generation(self, study: optuna.Study) -> Mapping[str, Any]:
        """What a genetic sampler notes of a trial that it draws now: it breeds from none without,
        and so not from the plans that others proposed."""
        import optuna

        trial = study.ask()
        sampler: Any = make_sampler(self._sampler, self._seed)
        sampler.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])
        return study.tell(trial, state=optuna.trial.TrialState.FAIL).system_attrs


def _shortened(study: optuna.Study, loss_at: int) -> optuna.Study:
    """The study itself, or when it has grown long, one of its trials that matter most; `loss_at`
    is the place of the fidelity loss among its values."""
    import optuna

    if len(study.get_trials(deepcopy=False)) < 4 * _REMEMBERED:  # half of them asked, half told
        return study
    whole = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    by_loss = sorted(whole[: -_REMEMBERED // 2], key=lambda trial: trial.values[loss_at])
    kept = sorted(
        [*by_loss[: _REMEMBERED // 2], *whole[-_REMEMBERED // 2 :]], key=lambda t: t.number
    )
    shorter = optuna.create_study(directions=study.directions)
    shorter.add_trials(kept)
    return shorter


def _moved(hold: float, rng: random.Random, distance: float) -> float:
    return min(1.0, max(0.0, hold + rng.gauss(0.0, 1.0) * distance))
