"""Recovers finalists: distils the best plans of every budget and races schedules for each.

Each finalist has a lane of its own: its schedules follow one another, each proposed by Optuna from
the results of those before it. Lanes run side by side, so what is proposed depends neither on how
many run at once nor on interruptions; a lane that was cut off replays its stored outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pydantic import JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt

from search.samplers import make_sampler
from storage import layout
from storage.digest import digest_json
from storage.errors import EspalierError
from storage.section import Section
from storage.store import Store, StoreOptions
from trainers.placement import Accelerator, Share
from trainers.probe import ProbeConfig
from trainers.progress import Progress, silent
from trainers.schedule import Schedule, ScheduleSpace
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher
from trainers.worker import RecoveryJob, RecoveryOutcome, read_outcome

if TYPE_CHECKING:
    import optuna


class RecoverError(EspalierError):
    """A budget for which no recovery came through."""


class RecoverConfig(Section):
    """How finalists are distilled."""

    finalists: PositiveInt = 1
    """Plans of each budget that are distilled, those of lowest fidelity loss."""

    schedules: PositiveInt = 2
    """Schedules that are tried for each finalist."""

    space: ScheduleSpace = ScheduleSpace()
    """The schedules to choose among. The first one tried is in the middle of every range."""

    workers: PositiveInt = 2
    """Processes that one student is spread over. On GPUs each has one of its own, so there are
    never more than the cluster has GPUs."""

    concurrent: PositiveInt = 1
    """Recoveries at a time, of different finalists."""

    checkpoint_every: PositiveInt = 100
    """Optimizer steps between checkpoints."""

    retries: NonNegativeInt = 2
    """How often a recovery goes on from its latest checkpoint after losing a worker."""

    shard_teacher: bool = False
    """Whether the teacher is spread over the workers too. Takes less memory and more time."""


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


class Recovery(Section):
    """One recovery that ended, well or not."""

    budget: str
    """Label of the budget."""
    trial: str
    """Its name in the storage, see layout.recovery."""
    student: str
    """Prefix of the student it ended with, see trainers.worker.load_student; empty there after a
    failure."""
    finalist: NonNegativeInt
    """Rank of the plan among the budget's finalists."""
    plan: Plan
    """What was recovered."""
    schedule: Schedule
    """How."""
    loss_before: NonNegativeFloat
    """Fidelity loss as assembled."""
    fidelity_loss: NonNegativeFloat | None
    """After recovery; None when it failed."""
    failed: str | None
    """Why, in one sentence."""
    seconds: NonNegativeFloat
    """Training time without start-up."""


@dataclass(frozen=True)
class Trial:
    """A recovery that is to run, is running, or has ended."""

    finalist: Finalist
    schedule: Schedule
    name: str
    job: RecoveryJob


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

    def trial(self, finalist: Finalist, number: int, schedule: Schedule) -> Trial:
        """The recovery of a finalist by its schedule `number`; named by all that decides it."""
        used = [
            (block, self.replacements[block])
            for block in finalist.plan.blocks
            if block.start == "library"
        ]
        made_from: dict[str, JsonValue] = {
            "teacher": self.teacher.digest,
            "plan": finalist.plan.digest,
            "replacements": cast("JsonValue", [prefix for _, prefix in used]),
            "encoding": self.encoding,
            "schedule": schedule.model_dump(mode="json"),
            "probe": self.probe.model_dump(mode="json"),
            "seed": self.seed,
        }
        name = f"{finalist.rank}-{number}-{digest_json(made_from)}"
        where = (self.sweep, finalist.budget, name)
        job = RecoveryJob(
            teacher=str(self.teacher.folder),
            store=self.store.url,
            options=self.options,
            encoding=self.encoding,
            replacements=tuple(used),
            plan=finalist.plan,
            schedule=schedule,
            probe=self.probe,
            seed=self.seed,
            probe_seed=self.seed,
            prefix=layout.recovery(*where),
            checkpoints=layout.checkpoint(*where),
            student=layout.finalist(*where),
            checkpoint_every=self.config.checkpoint_every,
            shard_teacher=self.config.shard_teacher,
            num_cpus=self.share.num_cpus,
            num_gpus=self.share.num_gpus,
            threads=self.share.threads,
            device=self.share.device,
        )
        return Trial(finalist, schedule, name, job)


class Lane:
    """The schedules of one finalist, one after the other."""

    def __init__(
        self,
        finalist: Finalist,
        space: ScheduleSpace,
        count: int,
        seed: int,
        trial: Callable[[Finalist, int, Schedule], Trial],
        outcome: Callable[[Trial], RecoveryOutcome | None],
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.finalist, self.count = finalist, count
        self._space, self._seed = space, seed
        self._trial, self._outcome = trial, outcome
        self._study = optuna.create_study(direction="minimize")
        self._study.enqueue_trial(space.middle())
        self._current: tuple[Trial, optuna.Trial] | None = None
        self._taken = False
        self._ended: list[tuple[Trial, RecoveryOutcome | None]] = []

    @property
    def done(self) -> bool:
        """Whether nothing is left to run."""
        return len(self._ended) == self.count

    @property
    def ended(self) -> list[tuple[Trial, RecoveryOutcome | None]]:
        """Trials so far, in order; without an outcome, those that broke down."""
        return list(self._ended)

    @property
    def best(self) -> float | None:
        """Lowest fidelity loss so far."""
        losses = [o.fidelity_loss for _, o in self._ended if o and o.fidelity_loss is not None]
        return min(losses, default=None)

    def advance(self) -> bool:
        """Replay outcomes that are stored; whether a trial is waiting to be taken."""
        while self._current is None and len(self._ended) < self.count:
            self._current = self._propose()
            if self._outcome(self._current[0]) is not None:
                self.end()
        return self._current is not None and not self._taken

    def take(self) -> Trial:
        """The trial that is waiting; the lane is busy until `end`."""
        assert self._current is not None
        assert not self._taken
        self._taken = True
        return self._current[0]

    def end(self) -> None:
        """The taken trial has ended; what it stored is what counts."""
        import optuna

        assert self._current is not None
        trial, asked = self._current
        outcome = self._outcome(trial)
        if outcome is not None and outcome.fidelity_loss is not None:
            self._study.tell(asked, outcome.fidelity_loss)
        else:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        self._ended.append((trial, outcome))
        self._current, self._taken = None, False

    def _propose(self) -> tuple[Trial, optuna.Trial]:

        number = len(self._ended)
        mixed = digest_json([self._seed, self.finalist.budget, self.finalist.rank, number])
        self._study.sampler = make_sampler("tpe", seed=int(mixed[:8], 16), startup=3)
        asked = self._study.ask()
        choice: dict[str, float] = {}
        for name, (low, high) in self._space.ranges().items():
            if isinstance(low, int) and isinstance(high, int):
                choice[name] = asked.suggest_int(name, low, high, log=True)
            else:
                choice[name] = asked.suggest_float(name, low, high, log=True)
        return self._trial(self.finalist, number, self._space.schedule(choice)), asked


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
) -> list[Recovery]:
    """Recover every finalist by `config.schedules` schedules, as Ray Train jobs in Tune trials.

    Finished recoveries are found in the store and not repeated, unfinished ones go on from their
    latest checkpoint. Ray must be up. A recovery that fails leaves the others alone; RecoverError
    names a budget of which none came through.
    """
    progress = progress or silent()
    workers, share = placed(config, accelerator)
    grounds = Grounds(
        sweep, teacher, store, options, encoding, replacements, config, share, probe, seed
    )
    lanes = [
        Lane(
            finalist,
            config.space,
            config.schedules,
            seed,
            grounds.trial,
            lambda trial: read_outcome(store, trial.job.prefix),
        )
        for finalist in finalists
    ]
    errors: dict[str, str] = {}
    if any(lane.advance() for lane in lanes):
        from search.racing import race

        errors = race(lanes, sweep, config, workers, share, progress)
    recoveries = [
        _recovery(trial, outcome, errors) for lane in lanes for trial, outcome in lane.ended
    ]
    for budget in dict.fromkeys(finalist.budget for finalist in finalists):
        mine = [recovery for recovery in recoveries if recovery.budget == budget]
        if all(recovery.failed for recovery in mine):
            raise RecoverError(
                f"budget {budget}: every recovery failed, the last: {mine[-1].failed}"
            )
    return recoveries


def placed(config: RecoverConfig, accelerator: Accelerator) -> tuple[int, Share]:
    """Workers of one recovery, and the share of the cluster that each of them gets."""
    import ray

    from trainers.placement import share_of

    workers, together = config.workers, config.workers * config.concurrent
    if accelerator == "gpu":
        # NCCL refuses two ranks on one GPU.
        gpus = max(1, int(ray.cluster_resources().get("GPU", 0)))
        workers = min(workers, gpus)
        together = min(together, max(workers, gpus))
    return workers, share_of(together, accelerator)


def _recovery(trial: Trial, outcome: RecoveryOutcome | None, errors: Mapping[str, str]) -> Recovery:
    failed = errors.get(trial.name, "it broke down") if outcome is None else outcome.failed
    return Recovery(
        budget=trial.finalist.budget,
        trial=trial.name,
        student=trial.job.student,
        finalist=trial.finalist.rank,
        plan=trial.finalist.plan,
        schedule=trial.schedule,
        loss_before=trial.finalist.loss,
        fidelity_loss=outcome.fidelity_loss if outcome else None,
        failed=failed,
        seconds=outcome.seconds if outcome else 0.0,
    )
