"""Races with invented losses in place of recoveries."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from search.tiers import Candidate, Choice, Finalist, Race, Rules, Run
from trainers.schedule import PhaseSpace, Schedule, ScheduleSpace
from trainers.students.plan import BlockPlan, Plan
from trainers.worker import RecoveryOutcome

SPACE = ScheduleSpace(
    phases=(
        PhaseSpace(loss="span", steps=(10, 40), lr=(1e-4, 1e-2)),
        PhaseSpace(loss="velocity", train="all", steps=30, lr=(1e-4, 1e-2)),
    )
)
PLAN = Plan(family="qwen_image", teacher_blocks=2, blocks=(BlockPlan(span=(0, 1)),))
TIERS = (0.1, 0.25, 1.0)

Losses = Callable[[int, int, int], float | None]
"""By rank of the finalist, number of its schedule, and tier; None fails."""


def finalists(count: int) -> list[Finalist]:
    return [Finalist("half", rank, PLAN, 0.5 + 0.1 * rank) for rank in range(count)]


@dataclass
class Bench:
    """Stands in for Ray and the store."""

    losses: Losses
    rules: Rules
    finalists: int = 1
    outcomes: dict[tuple[Candidate, int], RecoveryOutcome] = field(default_factory=dict)
    chosen: dict[Finalist, Sequence[Choice]] = field(default_factory=dict)
    ran: list[tuple[int, int, int]] = field(default_factory=list)
    """Rank, number and tier of what ran, in order of ending."""

    def race(self, seed: int = 0) -> Race:
        return Race(finalists(self.finalists), self.rules, SPACE, seed, self.outcome, self)

    def choices(self, finalist: Finalist) -> Sequence[Choice]:
        return self.chosen.get(finalist, ())

    def chose(self, finalist: Finalist, choices: Sequence[Choice]) -> None:
        self.chosen[finalist] = choices

    def outcome(self, candidate: Candidate, tier: int) -> RecoveryOutcome | None:
        return self.outcomes.get((candidate, tier))

    def end(self, run: Run) -> None:
        candidate = run.candidate
        place = (candidate.finalist.rank, candidate.number, run.tier)
        loss = self.losses(*place)
        steps = round(TIERS[run.tier - self.rules.tiers] * candidate.schedule.steps)
        self.outcomes[candidate, run.tier] = RecoveryOutcome(
            fidelity_loss=loss,
            failed="not finite" if loss is None else None,
            seconds=1.0,
            steps=steps,
        )
        self.ran.append(place)

    def run(self, race: Race, most: int = 99, at_once: int = 1, order: int = 0) -> Race:
        """Runs what waits, `at_once` side by side, ending in a random order."""
        chance, running = random.Random(order), list[Run]()
        while most > 0 and not race.done:
            while len(running) < at_once and (run := race.waiting()) is not None:
                race.take(run)
                running.append(run)
            self.end(running.pop(chance.randrange(len(running))))
            most -= 1
        return race


def schedules(race: Race) -> list[Schedule]:
    return [candidate.schedule for candidate in race.candidates]


def one_tier(count: int, **rules: float) -> Rules:
    return Rules(**{"finalists": 1, "schedules": count, "tiers": 1, "keep": 1, "widen": -1} | rules)  # type: ignore[arg-type]


def two_tiers(finalists: int, schedules: int, keep: float = 0.34, widen: float = -1) -> Rules:
    return Rules(finalists, schedules, 2, keep, widen)
