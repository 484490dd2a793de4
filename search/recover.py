"""Recovers finalists: distils the best plans of every budget and races schedules for each.

Who is measured when, and who goes on, is search/tiers.py; how a run becomes a Ray Train job,
search/racing.py. Here it is said what a run is made from, and what has come of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from search.ranks import rank_correlation
from search.samplers import Sampler
from search.tiers import Candidate, Choice, Finalist, Promotion, Race, Rules, Run
from storage import layout
from storage.digest import digest_json
from storage.errors import EspalierError, MissingKey
from storage.garbage import kept_students
from storage.manifest import published, withdraw
from storage.section import Section
from storage.store import Store, StoreOptions
from trainers.placement import Accelerator, Share
from trainers.probe import ProbeConfig
from trainers.progress import Progress, silent
from trainers.schedule import PLAIN, Schedule, ScheduleSpace, StepConfig
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher
from trainers.worker import RecoveryJob, RecoveryOutcome, read_outcome

Part = Annotated[float, Field(gt=0, le=1)]


class RecoverError(EspalierError):
    """No recovery came through, of any budget."""


class RecoverConfig(Section):
    """How finalists are distilled."""

    finalists: PositiveInt = 3
    """Plans of each budget that are distilled, those of lowest fidelity loss. With one, that loss
    alone decides, which is measured before recovery and says little of what recovery makes of a
    plan (TinyFusion)."""

    schedules: PositiveInt = 2
    """Schedules that are tried for each finalist; one where `space` leaves nothing to choose."""

    tiers: Annotated[tuple[Part, ...], Field(min_length=1)] = (0.25, 1.0)
    """Parts of a schedule, ascending, after which fidelity is measured and the better ones go on
    from there. The last is 1."""

    keep: Part = 0.5
    """Part of the candidates (finalists with a schedule each) that goes on from a tier to the next;
    always at least one."""

    promotion: Promotion = "halving"
    """Whether a tier waits for all its candidates before the better ones go on (`halving`), or
    they go on while others still run (`asha`): more do, since later schedules are mostly better,
    and no worker waits; for when `concurrent` is more than what a tier has left at its end."""

    widen: Annotated[float, Field(ge=-1, le=1)] = 0.4
    """Rank correlation of two neighbouring tiers below which the lower one misleads: as many
    candidates again then go on from it, once; and as many more finalists are recovered, when it is
    the fidelity loss as assembled. Measured where three or more have come through both; at -1
    nothing is widened."""

    sampler: Sampler = "tpe"
    """Which of Optuna's samplers proposes a finalist's schedules after the first: `tpe`, `nsga2`,
    `nsga3`, `gp` or `random`."""

    space: ScheduleSpace = ScheduleSpace()
    """The schedules to choose among. The first one tried is in the middle of every range."""

    step: StepConfig = PLAIN
    """How an optimizer step is taken: memory, speed, averaging."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Processes that one student is spread over; two numbers are the fewest and the most, between
    which a recovery goes on with as many as the cluster has room for at the time: with fewer as
    soon as a machine is lost, with more within a minute of one coming, from its last checkpoint. On
    GPUs each has one of its own: a single number is at most as many as the cluster has at first."""

    concurrent: PositiveInt = 1
    """Recoveries at a time."""

    checkpoint_every: PositiveInt = 100
    """Optimizer steps between checkpoints."""

    keep_checkpoints: PositiveInt = 2
    """Checkpoints of a recovery that stay while it runs, the newest ones."""

    retries: NonNegativeInt = 2
    """How often a recovery goes on from its latest checkpoint after losing a worker; counted anew,
    when they are used up, if it has come to another checkpoint by then."""

    timeout: PositiveFloat = 1800.0
    """Seconds that a step may take, or the loading before the first; a worker that takes longer
    hangs, and counts as lost."""

    shard_teacher: bool = False
    """Whether the teacher is spread over the workers too. Takes less memory and more time."""

    @field_validator("tiers")
    @classmethod
    def _end_at_the_end(cls, tiers: tuple[float, ...]) -> tuple[float, ...]:
        if list(tiers) != sorted(set(tiers)) or tiers[-1] != 1:
            raise ValueError(
                f"must ascend and end with 1, got {list(tiers)}; write [0.25, 1], or [1] to run "
                "every schedule to its end"
            )
        return tiers

    @property
    def range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @field_validator("workers")
    @classmethod
    def _rising(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"{list(workers)} is reversed; write the fewest first")
        return workers


class Measured(Section):
    """What a recovery was worth at the end of a tier."""

    part: Part
    """Of the schedule."""
    fidelity_loss: NonNegativeFloat


class Recovery(Section):
    """One recovery that ended, well or not."""

    budget: str
    """Label of the budget."""
    trial: str
    """Its name in the storage, see layout.recovery."""
    student: str
    """Prefix of the student it ended with, see trainers.worker.load_student; empty there unless
    it came to the schedule's end."""
    finalist: NonNegativeInt
    """Rank of the plan among the budget's finalists."""
    plan: Plan
    """What was recovered."""
    schedule: Schedule
    """How."""
    loss_before: NonNegativeFloat
    """Fidelity loss as assembled."""
    measured: tuple[Measured, ...]
    """Fidelity loss tier by tier, as far as it came."""
    fidelity_loss: NonNegativeFloat | None
    """At the schedule's end; None when it did not come there."""
    state: Literal["complete", "stopped", "failed"]
    """`stopped`: others were better in a lower tier."""
    failed: str | None
    """Why, in one sentence."""
    broke: bool = False
    """Whether it failed because it was cut off, and may come through when it is tried again."""
    seconds: NonNegativeFloat
    """Training time without start-up."""


class Agreement(Section):
    """How alike two neighbouring tiers rank the candidates of a budget."""

    budget: str
    """Its label."""
    lower: NonNegativeFloat
    """The tier by its part of the schedule; 0 is the plan as assembled."""
    upper: Part
    rho: float
    """Spearman's rank correlation."""
    count: PositiveInt
    """Of those measured in both."""


@dataclass(frozen=True)
class Grounds:
    """What all recoveries of a sweep have in common."""

    sweep: str
    teacher: Teacher
    store: Store
    options: StoreOptions
    encoding: str
    """Prefix of the latents."""
    replacements: Mapping[BlockPlan, str]
    """Where the library keeps each replacement."""
    config: RecoverConfig
    share: Share
    """Of each worker."""
    probe: ProbeConfig
    seed: int

    def name(self, candidate: Candidate) -> str:
        """A candidate's name in the storage: of all that decides what it becomes."""
        made_from = self._made_from(candidate.finalist)
        made_from["schedule"] = candidate.schedule.model_dump(mode="json")
        return f"{candidate.finalist.rank}-{candidate.number}-{digest_json(made_from)}"

    def proposed(self, finalist: Finalist) -> str:
        """The key of what was chosen for a finalist's schedules: by all that decides it."""
        made_from = self._made_from(finalist)
        made_from["space"] = self.config.space.model_dump(mode="json")
        made_from["sampler"] = self.config.sampler
        name = f"{finalist.rank}-{digest_json(made_from)}"
        return layout.proposed(self.sweep, finalist.budget, name)

    def _made_from(self, finalist: Finalist) -> dict[str, JsonValue]:
        made_from: dict[str, JsonValue] = {
            "teacher": self.teacher.digest,
            "plan": finalist.plan.digest,
            "replacements": cast("JsonValue", [prefix for _, prefix in self._used(finalist.plan)]),
            "encoding": self.encoding,
            "tiers": list(self.config.tiers),
            "probe": self.probe.model_dump(mode="json"),
            "seed": self.seed,
        }
        # What else a step says costs memory or time and changes nothing that is learned.
        learned = {"optimizer", "average", "spike", "rollbacks"}
        said = self.config.step.model_dump(mode="json", include=learned, exclude_defaults=True)
        return made_from | ({"step": said} if said else {})

    def job(self, candidate: Candidate, tier: int) -> RecoveryJob:
        """What brings a candidate to the end of a tier."""
        finalist, schedule = candidate.finalist, candidate.schedule
        until = steps_until(self.config.tiers[tier], schedule)
        where = (self.sweep, finalist.budget, self.name(candidate))
        return RecoveryJob(
            teacher=self.teacher.address,
            teacher_digest=self.teacher.digest,
            store=self.store.url,
            options=self.options,
            encoding=self.encoding,
            replacements=self._used(finalist.plan),
            plan=finalist.plan,
            schedule=schedule,
            step=self.config.step,
            until=until,
            probe=self.probe,
            seed=self.seed,
            probe_seed=self.seed,
            prefix=layout.measured(*where, until),
            checkpoints=layout.checkpoint(*where),
            student=layout.finalist(*where),
            checkpoint_every=self.config.checkpoint_every,
            keep_checkpoints=self.config.keep_checkpoints,
            timeout=self.config.timeout,
            shard_teacher=self.config.shard_teacher,
            num_cpus=self.share.num_cpus,
            num_gpus=self.share.num_gpus,
            threads=self.share.threads,
            device=self.share.device,
        )

    def _used(self, plan: Plan) -> tuple[tuple[BlockPlan, str], ...]:
        library = (block for block in plan.blocks if block.start == "library")
        return tuple((block, self.replacements[block]) for block in library)


def steps_until(part: float, schedule: Schedule) -> int:
    """The optimizer step after which a part of a schedule ends."""
    return math.ceil(part * schedule.steps)


class Book:
    """The outcomes of runs: read from the store once, noted as they come in. And what was chosen
    for every schedule, since a run that broke off is tried again by a later attempt, which must
    not turn what came after it into something else."""

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds
        self._known: dict[tuple[Candidate, int], RecoveryOutcome | None] = {}
        self.broken: set[Candidate] = set()
        """Those of which a run has broken down."""

    def __call__(self, candidate: Candidate, tier: int) -> RecoveryOutcome | None:
        if (candidate, tier) not in self._known:
            self._known[candidate, tier] = self._read(candidate, tier)
        return self._known[candidate, tier]

    def choices(self, finalist: Finalist) -> list[Choice]:
        """What an earlier attempt chose for a finalist's schedules, as far as it came."""
        try:
            with self._grounds.store.read(self._grounds.proposed(finalist)) as body:
                said: Any = json.load(body)
            return [{str(name): value + 0 for name, value in choice.items()} for choice in said]
        except MissingKey:
            return []
        except (ValueError, TypeError, AttributeError):
            return []  # damaged; what follows from the outcomes is proposed again

    def chose(self, finalist: Finalist, choices: Sequence[Choice]) -> None:
        """Note what has been chosen so far."""
        body = json.dumps([dict(choice) for choice in choices]).encode()
        self._grounds.store.write(self._grounds.proposed(finalist), body)

    def ended(self, run: Run, broke: str = "its Ray Train job ended without an outcome") -> None:
        """A run has ended: with what it stored, or else it broke down."""
        outcome = self._read(run.candidate, run.tier)
        if outcome is None:
            # Not stored: another attempt, of a sweep that is started again, may come through.
            outcome = RecoveryOutcome(fidelity_loss=None, failed=broke, seconds=0.0, steps=0)
            self.broken.add(run.candidate)
        self._known[run.candidate, run.tier] = outcome

    def _read(self, candidate: Candidate, tier: int) -> RecoveryOutcome | None:
        store, job = self._grounds.store, self._grounds.job(candidate, tier)
        outcome = read_outcome(store, job.prefix)
        whole = outcome is not None and not outcome.failed and job.until == job.schedule.steps
        if whole and published(store, job.student) is None and self._wanted(job.student):
            # It was stored first: somebody has removed it, and wants it made again.
            withdraw(store, job.prefix)
            return None
        return outcome

    def _wanted(self, student: str) -> bool:
        """Whether a student that has gone is made again: none that `gc` takes away."""
        kept = kept_students(self._grounds.store, self._grounds.sweep)
        return kept is None or student in kept


def recover_finalists(
    finalists: Sequence[Finalist],
    *,
    sweep: str,
    teacher: Teacher,
    store: Store,
    options: StoreOptions,
    encoding: str,
    replacements: Mapping[BlockPlan, str],
    config: RecoverConfig,
    accelerator: Accelerator,
    probe: ProbeConfig,
    seed: int,
    progress: Progress | None = None,
    show: Callable[[Sequence[Race]], None] = lambda races: None,
) -> list[Recovery]:
    """Recover finalists, each by `config.schedules` schedules at most, as Ray Train jobs of Tune.

    `finalists` are each budget's, best first; beyond `config.finalists` they are a reserve. What is
    finished is found in the store and not repeated, what is unfinished goes on from its latest
    checkpoint. Ray must be up. A recovery that fails leaves the others alone, and so does a budget
    of which none came through, see `lost_budgets`; RecoverError when that is so of every budget.
    `show` is given the races whenever there is something new about them.
    """
    progress = progress or silent()
    workers, share = placed(config, accelerator)
    grounds = Grounds(
        sweep, teacher, store, options, encoding, replacements, config, share, probe, seed
    )
    book = Book(grounds)
    rules = Rules(
        config.finalists,
        1 if config.space.fixed else config.schedules,
        len(config.tiers),
        config.keep,
        config.widen,
        config.sampler,
        config.promotion,
    )
    by_budget: dict[str, list[Finalist]] = {}
    for finalist in finalists:
        by_budget.setdefault(finalist.budget, []).append(finalist)
    races = [Race(mine, rules, config.space, seed, book, book) for mine in by_budget.values()]
    if not all(race.done for race in races):
        from search.racing import run_races

        run_races(races, book, grounds, workers, progress, show)
    show(races)
    recoveries = [
        _recovery(grounds, race, candidate, candidate in book.broken)
        for race in races
        for candidate in race.candidates
    ]
    for recovery in recoveries:
        if recovery.state == "stopped":
            withdraw(store, layout.checkpoint(sweep, recovery.budget, recovery.trial))
    lost = lost_budgets(recoveries)
    if len(lost) == len(by_budget):
        budget, why = next(iter(lost.items()))
        raise RecoverError(f"budget {budget}: every recovery failed, the last: {why}")
    return recoveries


def lost_budgets(recoveries: Sequence[Recovery]) -> dict[str, str]:
    """The budgets of which no recovery came through, and why the last one failed."""
    lost: dict[str, str] = {}
    for budget in dict.fromkeys(recovery.budget for recovery in recoveries):
        mine = [recovery for recovery in recoveries if recovery.budget == budget]
        if not any(recovery.state == "complete" for recovery in mine):
            lost[budget] = [recovery.failed for recovery in mine if recovery.failed][-1]
    return lost


def agreements(recoveries: Sequence[Recovery]) -> list[Agreement]:
    """How alike neighbouring tiers rank what came through both, by budget; without those where
    fewer than three did. As assembled a plan counts once, above it with its best schedule."""
    found: list[Agreement] = []
    for budget in dict.fromkeys(recovery.budget for recovery in recoveries):
        mine = [recovery for recovery in recoveries if recovery.budget == budget]
        pairs: dict[tuple[float, float], list[tuple[float, float]]] = {}
        plans: dict[int, list[tuple[float, float, float]]] = {}
        for recovery in mine:
            for first in recovery.measured[:1]:
                plans.setdefault(recovery.finalist, []).append(
                    (first.fidelity_loss, recovery.loss_before, first.part)
                )
            for lower, upper in zip(recovery.measured, recovery.measured[1:], strict=False):
                both = (lower.fidelity_loss, upper.fidelity_loss)
                pairs.setdefault((lower.part, upper.part), []).append(both)
        for after, before, part in map(min, plans.values()):
            pairs.setdefault((0.0, part), []).append((before, after))
        for (low, high), both_losses in sorted(pairs.items()):
            rho = rank_correlation([a for a, _ in both_losses], [b for _, b in both_losses])
            if rho is not None:
                found.append(
                    Agreement(budget=budget, lower=low, upper=high, rho=rho, count=len(both_losses))
                )
    return found


def placed(config: RecoverConfig, accelerator: Accelerator) -> tuple[tuple[int, int], Share]:
    """Fewest and most workers of one recovery, and each one's share of the cluster."""
    import ray

    from trainers.placement import share_of

    fewest, most = config.range
    together = most * config.concurrent
    if accelerator == "gpu":
        # NCCL refuses two ranks on one GPU.
        gpus = max(1, int(ray.cluster_resources().get("GPU", 0)))
        together = min(together, gpus)
        # Of two numbers the most may be more than there are yet.
        most = min(most, gpus) if fewest == most else most
        fewest = min(fewest, gpus)
    return (fewest, most), share_of(together, accelerator)


def _recovery(grounds: Grounds, race: Race, candidate: Candidate, broke: bool) -> Recovery:
    finalist, config = candidate.finalist, grounds.config
    outcomes = race.outcomes(candidate)
    measured = tuple(
        Measured(part=config.tiers[tier], fidelity_loss=outcome.fidelity_loss)
        for tier, outcome in outcomes
        if outcome.fidelity_loss is not None
    )
    _, last = outcomes[-1]
    whole = bool(measured) and measured[-1].part == 1
    return Recovery(
        budget=finalist.budget,
        trial=grounds.name(candidate),
        student=layout.finalist(grounds.sweep, finalist.budget, grounds.name(candidate)),
        finalist=finalist.rank,
        plan=finalist.plan,
        schedule=candidate.schedule,
        loss_before=finalist.loss,
        measured=measured,
        fidelity_loss=measured[-1].fidelity_loss if whole else None,
        state="failed" if last.failed else "complete" if whole else "stopped",
        failed=last.failed,
        broke=broke,
        seconds=last.seconds,
    )
