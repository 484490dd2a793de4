"""Who goes how far: the candidates of one budget, measured ever later in their schedules.

Tiers: a plan is scored as assembled, its finalists are recovered by a part of a schedule, the
better ones to the end; a candidate that goes up continues from where it was measured. By halving,
one bracket of Hyperband, a tier waits for all its candidates. By ASHA (Li et al. 2020) the best of
those that have ended go on, so that no worker waits for the slowest; of 4 to 24 candidates in
random order 1.1 to 1.25 times as many do. Its paper goes by who ended first, this by who was
proposed first. What a low tier misleads about is not guessed by hedging, as Hyperband's other
brackets do, but measured: where its order and the order a tier above disagree, it is widened.
Nothing here runs anything: what happens next follows from the stored outcomes alone, whatever the
number of workers and after any interruption; what was once chosen for a schedule stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from search.ranks import rank_correlation
from search.samplers import Sampler, make_sampler
from storage.digest import digest_json
from trainers.schedule import Schedule, ScheduleSpace
from trainers.students.plan import Plan
from trainers.worker import RecoveryOutcome

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Item = TypeVar("Item")

Promotion = Literal["halving", "asha"]
"""When candidates go on from a tier: once all have ended there, or while others still run."""


@dataclass(frozen=True)
class Finalist:
    """A plan that won its place in the search."""

    budget: str
    """Label of the budget."""
    rank: int
    """0 is the budget's best."""
    plan: Plan
    loss: float
    """Fidelity loss as assembled, before recovery."""


@dataclass(frozen=True)
class Candidate:
    """A finalist with a schedule."""

    finalist: Finalist
    number: int
    """Of the schedule, among the finalist's."""
    schedule: Schedule
    choice: tuple[tuple[str, float], ...] = ()
    """What was chosen of its space, by name."""


@dataclass(frozen=True)
class Run:
    """A candidate on its way to the end of a tier."""

    candidate: Candidate
    tier: int


Outcome = Callable[[Candidate, int], RecoveryOutcome | None]
"""What a candidate had come to at the end of a tier; None while it has not."""

Choice = Mapping[str, float]
"""What was chosen of a space of schedules, by name."""


class Memory(Protocol):
    """Keeps what was chosen for every finalist's schedules."""

    def choices(self, finalist: Finalist) -> Sequence[Choice]:
        """Those of an earlier attempt."""

    def chose(self, finalist: Finalist, choices: Sequence[Choice]) -> None:
        """All there are now."""


@dataclass(frozen=True)
class Rules:
    """How many go how far."""

    finalists: int
    """Plans that enter the first tier; more are let in when the scores as assembled mislead."""
    schedules: int
    """For each of them."""
    tiers: int
    """Recovery is measured so often."""
    keep: float
    """Part of a tier's candidates that goes on, at least one."""
    widen: float
    """Rank correlation of two tiers below which as many again go on from the lower."""
    sampler: Sampler = "tpe"
    """Proposes schedules."""
    promotion: Promotion = "halving"

    def promoted(self, count: int) -> int:
        """Of so many candidates, how many go on."""
        return max(1, round(count * self.keep))


def forerunners(
    entrants: Sequence[Item], ended: Callable[[Item], tuple[bool, float | None]], keep: float
) -> list[Item]:
    """The items of a tier that go on while others still run there, by ASHA's rule: those that are
    in the best part `keep` of the first one, the first two, and so on. Which they are never changes
    with what comes later. `ended` is as `above` of `climbers`, of this tier."""
    going: list[Item] = []
    before: list[tuple[Item, float]] = []
    for count, item in enumerate(entrants, 1):
        whole, loss = ended(item)
        if not whole:
            break
        if loss is not None:
            before = sorted([*before, (item, loss)], key=lambda pair: pair[1])
        going += [item for item, _ in before[: math.floor(count * keep)] if item not in going]
    return going


def climbers(
    ranked: Sequence[tuple[Item, float]],
    above: Callable[[Item], tuple[bool, float | None]],
    width: int,
    widen: float,
) -> list[Item]:
    """The items of a tier that go on to the next.

    Given their losses in this one, ascending, and what is known of them above: whether they have
    come to the end there, and their loss. `width` of them go on; as many again whenever all that
    did have failed, and once when the tiers rank them differently (`widen`).
    """
    going = min(width, len(ranked))
    while going < len(ranked):
        known = [(loss, *above(item)) for item, loss in ranked[:going]]
        if not all(ended for _, ended, _ in known):
            break
        both = [(loss, found) for loss, _, found in known if found is not None]
        rho = rank_correlation([lower for lower, _ in both], [upper for _, upper in both])
        misled = rho is not None and rho < widen and going == width
        if both and not misled:
            break
        going = min(going + width, len(ranked))
    return [item for item, _ in ranked[:going]]


def distributions(space: ScheduleSpace) -> dict[str, BaseDistribution]:
    """What there is to choose, as Optuna has it."""
    from optuna.distributions import FloatDistribution, IntDistribution

    return {
        name: IntDistribution(low, high, log=True)
        if isinstance(low, int) and isinstance(high, int)
        else FloatDistribution(low, high, log=True)
        for name, (low, high) in space.ranges().items()
    }


class Lane:
    """The schedules of one finalist, each proposed by Optuna from how those before it did in the
    first tier."""

    def __init__(
        self,
        finalist: Finalist,
        space: ScheduleSpace,
        rules: Rules,
        seed: int,
        memory: Memory | None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.finalist, self.count = finalist, rules.schedules
        self._sampler = rules.sampler
        self._space, self._seed, self._memory = space, seed, memory
        self._study = optuna.create_study(direction="minimize")
        self._chosen: list[Choice] | None = None
        """By an earlier attempt; None before that was looked up."""
        self._asked: optuna.Trial | None = None
        self.candidates: list[Candidate] = []
        """Proposed so far."""

    def advance(self, outcome: Outcome) -> None:
        """Proposes as far as outcomes are known."""
        while True:
            if self._asked is not None:
                found = outcome(self.candidates[-1], 0)
                if found is None:
                    return
                self._tell(found)
            if len(self.candidates) == self.count:
                return
            self._propose()

    def ended(self, outcome: Outcome) -> bool:
        """Whether all schedules have come to the end of the first tier."""
        self.advance(outcome)
        return len(self.candidates) == self.count and self._asked is None

    def _propose(self) -> None:
        number = len(self.candidates)
        if self._chosen is None:
            self._chosen = list(self._memory.choices(self.finalist)) if self._memory else []
        given = [self._space.middle(), *self._chosen[1:]]
        if number < len(given):
            self._study.enqueue_trial(dict(given[number]))
        mixed = digest_json([self._seed, self.finalist.budget, self.finalist.rank, number])
        self._study.sampler = make_sampler(self._sampler, seed=int(mixed[:8], 16), startup=3)
        self._asked = self._study.ask(distributions(self._space))
        choice = self._asked.params
        schedule, chosen = self._space.schedule(choice), tuple(choice.items())
        self.candidates.append(Candidate(self.finalist, number, schedule, chosen))
        if self._memory is not None and number >= max(1, len(self._chosen)):
            self._memory.chose(self.finalist, [dict(each.choice) for each in self.candidates])

    def _tell(self, outcome: RecoveryOutcome) -> None:
        from optuna.trial import TrialState

        assert self._asked is not None
        if outcome.fidelity_loss is None:
            self._study.tell(self._asked, state=TrialState.FAIL)
        else:
            # What the sampler is to lower is the loss after the first tier, where all are measured;
            # who is stopped there is not known before all are, and of trials that are told as
            # pruned most samplers learn nothing. People are shown them as pruned, see racelog.py.
            self._study.tell(self._asked, outcome.fidelity_loss)
        self._asked = None


class Race:
    """The candidates of one budget."""

    def __init__(
        self,
        finalists: Sequence[Finalist],
        rules: Rules,
        space: ScheduleSpace,
        seed: int,
        outcome: Outcome,
        memory: Memory | None = None,
    ) -> None:
        """`finalists`, best first, may be more than `rules` lets in; the others are a reserve."""
        self.budget = finalists[0].budget
        self._rules, self._outcome = rules, outcome
        self._count = min(rules.finalists, len(finalists)) * rules.schedules
        # A tier that would stop nobody is not worth a halt.
        halts = rules.promoted(self._count) < self._count
        self.tiers: tuple[int, ...] = tuple(range(0 if halts else rules.tiers - 1, rules.tiers))
        """Numbers of the tiers that are run, of those there are."""
        self._lanes = [Lane(f, space, rules, seed, memory) for f in finalists]
        self._taken: set[Run] = set()

    @property
    def total(self) -> int:
        """How many runs there will be unless a tier is widened; never fewer than there are."""
        count, planned = self._count, 0
        for _ in self.tiers:
            planned += count
            count = self._rules.promoted(count)
        return max(planned, len(self._runs()))

    @property
    def candidates(self) -> list[Candidate]:
        """Those proposed so far, lane by lane."""
        return [c for lane in self._entered() for c in lane.candidates]

    @property
    def ended(self) -> list[Run]:
        """The runs that have an outcome."""
        return [run for run in self._runs() if self._of(run) is not None]

    @property
    def done(self) -> bool:
        """Whether nothing is left to run."""
        return len(self.ended) == len(self._runs())

    @property
    def best(self) -> float | None:
        """Lowest fidelity loss so far."""
        found = [self._of(run) for run in self._runs()]
        losses = [o.fidelity_loss for o in found if o and o.fidelity_loss is not None]
        return min(losses, default=None)

    def waiting(self) -> Run | None:
        """The next run that may start, if any; those that are farthest on come first."""
        free = [r for r in self._runs() if r not in self._taken and self._of(r) is None]
        return max(free, key=lambda run: run.tier, default=None)

    def take(self, run: Run) -> None:
        """Someone has begun it."""
        self._taken.add(run)

    def outcomes(self, candidate: Candidate) -> list[tuple[int, RecoveryOutcome]]:
        """What a candidate came to, tier by tier."""
        found = ((tier, self._outcome(candidate, tier)) for tier in self.tiers)
        return [(tier, outcome) for tier, outcome in found if outcome is not None]

    def _of(self, run: Run) -> RecoveryOutcome | None:
        return self._outcome(run.candidate, run.tier)

    def _runs(self) -> list[Run]:
        """All that are due by what is known, tier by tier."""
        lanes = self._entered()
        entrants = self._in_order(lanes)
        runs = [Run(candidate, self.tiers[0]) for candidate in entrants]
        settled = all(lane.ended(self._first) for lane in lanes)
        for lower, upper in zip(self.tiers, self.tiers[1:], strict=False):
            entrants = self._going(entrants, lower, upper, settled)
            runs += [Run(candidate, upper) for candidate in entrants]
            settled = settled and all(self._known(c, upper)[0] for c in entrants)
        return runs

    def _in_order(self, lanes: Sequence[Lane]) -> list[Candidate]:
        """First all first schedules, then all second ones; of lanes that came in later, after."""
        width = self._rules.finalists
        waves = [lanes[i : i + width] for i in range(0, len(lanes), width)]
        return [
            lane.candidates[number]
            for wave in waves
            for number in range(self._rules.schedules)
            for lane in wave
            if number < len(lane.candidates)
        ]

    def _going(
        self, entrants: Sequence[Candidate], lower: int, upper: int, settled: bool
    ) -> list[Candidate]:
        """Those that go on from a tier as far as that is known; `settled` says that all who will
        ever come to its end have."""
        asha = self._rules.promotion == "asha"
        early = (
            forerunners(entrants, partial(self._known, tier=lower), self._rules.keep)
            if asha
            else []
        )
        if not settled:
            return early
        late = climbers(
            self._ranked(entrants, lower),
            partial(self._known, tier=upper),
            self._rules.promoted(len(entrants)),
            self._rules.widen,
        )
        return [*early, *(candidate for candidate in late if candidate not in early)]

    def _entered(self) -> list[Lane]:
        """The lanes of the finalists that are in the race, advanced as far as they can be."""
        assembled = [(lane, lane.finalist.loss) for lane in self._lanes]
        lanes = climbers(assembled, self._came, self._rules.finalists, self._rules.widen)
        for lane in lanes:
            lane.advance(self._first)
        return lanes

    def _came(self, lane: Lane) -> tuple[bool, float | None]:
        """Whether a lane has ended its first tier, and its lowest loss there."""
        ended = lane.ended(self._first)  # which fills a lane that is taken up again
        losses = [loss for _, loss in self._ranked(lane.candidates, self.tiers[0])]
        return ended, min(losses, default=None)

    def _known(self, candidate: Candidate, tier: int) -> tuple[bool, float | None]:
        outcome = self._outcome(candidate, tier)
        return outcome is not None, outcome.fidelity_loss if outcome else None

    def _ranked(self, candidates: Sequence[Candidate], tier: int) -> list[tuple[Candidate, float]]:
        """Those that came to the end of a tier, best first."""
        found = [(c, self._known(c, tier)[1]) for c in candidates]
        return sorted(((c, loss) for c, loss in found if loss is not None), key=lambda p: p[1])

    def _first(self, candidate: Candidate, _: int) -> RecoveryOutcome | None:
        return self._outcome(candidate, self.tiers[0])
