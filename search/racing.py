"""What Ray sees of recoveries: a Tune trial for each run, done by the workers of a Ray Train job.

Import this late: it imports Ray Tune and Train. Small recoveries are mostly start-up, and start-up
is mostly processes that import torch and Ray. So one trial actor serves trial after trial, and the
workers of its Ray Train job stay for the next.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.recover import Book, Grounds
from search.study import StatelessSearcher, quiet_tune
from search.tiers import Race, Run
from storage.checkpoint import newest_step
from storage.errors import EspalierError
from storage.store import open_store
from trainers.desk import Desk, State
from trainers.placement import Share
from trainers.progress import Progress
from trainers.worker import RecoveryJob

TRAIN_ENVIRONMENT = {
    # How often Train looks at its workers, and so how soon it sees that one is lost.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # How often it looks for machines that will go. Some clouds say so 30 s before.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Read in the process that calls `fit`; Train hands it on to its own. What is set already stays."""

# Seconds that Train waits for room before it looks at the cluster again: for the one size that will
# do, which an autoscaler may have to bring; and for a size of its own choice, which it may have
# counted together from machines that were gone already.
_ROOM, _ROOM_ELASTIC = "300", "20"

# A driver only waits. It takes a place on the cluster's head, which is not preempted, and no CPU.
_DRIVER = {"node:__internal_head__": 0.001}
_PARTS = 100
"""In how many parts a recovery's progress is told."""
_LOOK_SECONDS = 0.1
_CLOSING_SECONDS = 60.0


class RaceSearcher(StatelessSearcher):
    """Hands Tune the next run of any race."""

    def __init__(
        self,
        races: Sequence[Race],
        book: Book,
        config: Callable[[Run], dict[str, Any]],
        progress: Progress,
        show: Callable[[Sequence[Race]], None] = lambda races: None,
    ):
        """`config` says what `RecoveryTrial` is given for a run; `show` hears of every run that
        begins or ends."""
        super().__init__()
        self._races, self._book, self._config = list(races), book, config
        self._progress, self._show = progress, show
        self._running: dict[str, Run] = {}
        self._parts: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        free = [(race, run) for race in self._races if (run := race.waiting()) is not None]
        self._tell()
        if not free:
            done = all(race.done for race in self._races)
            # None asks again once a running trial has ended.
            return str(Searcher.FINISHED) if done else None
        # The race that is furthest behind, so that budgets take turns.
        race, run = min(free, key=lambda pair: len(pair[0].ended))
        race.take(run)
        self._running[trial_id] = run
        self._show(self._races)
        return self._config(run)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if result.get("steps"):
            self._parts[trial_id] = _PARTS * result["step"] // result["steps"]
            facts = {"loss": result["loss"]} if "loss" in result else {}
            self._tell(**facts)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        run = self._running.pop(trial_id)
        self._parts.pop(trial_id, None)
        if error or result is None:
            self._book.ended(run, "its process was lost")
        elif "broken" in result:
            self._book.ended(run, result["broken"])
        else:
            self._book.ended(run)
        self._tell()
        self._show(self._races)

    def _tell(self, **facts: float | str) -> None:
        ended = sum(len(race.ended) for race in self._races)
        total = sum(race.total for race in self._races)
        done = ended * _PARTS + sum(self._parts.values())
        facts |= {race.budget: race.best for race in self._races if race.best is not None}
        self._progress.update(done, total * _PARTS, **facts)


@dataclass(frozen=True)
class Fleet:
    """What the crews of a stage have in common."""

    folder: str
    """Where Ray Train keeps its own records."""
    fewest: int
    most: int
    """Workers of a crew."""
    retries: int
    """How often a crew starts again after losing a worker, without coming to a checkpoint."""
    share: Share
    """Of each worker."""


class Crew:
    """Workers of one Ray Train job, which take recovery after recovery."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # Beside this process, and not in the trial's placement group, which has no room.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()
        self._newest: Callable[[], int] = lambda: 0
        self._saved = 0
        self.error: BaseException | None = None
        """What their job ended with, before it was told to."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, job: dict[str, Any]) -> None:
        """Their next job."""
        self._newest = _newest_step_of(RecoveryJob.model_validate(job))
        self._saved = self._newest()
        self._desk.put.remote(job)

    def look(self) -> State:
        """How the job stands."""
        found: State = ray.get(self._desk.look.remote())
        return found

    def close(self) -> None:
        """Let them go, and wait until they have."""
        self._desk.close.remote()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        try:
            trainer = self._trainer()
            while not self._fit(trainer):
                pass
        except BaseException as error:
            self.error = error

    def _fit(self, trainer: Any) -> bool:
        """One run; False when there has to be another: they have left machines that will go, or
        were lost as often as a run bears it and still came to a new checkpoint. Train itself counts
        over a whole run, and a long one loses workers now and then."""
        from ray.train import TrainingFailedError

        try:
            return bool(trainer.fit().return_value)
        except TrainingFailedError:
            before, self._saved = self._saved, self._newest()
            if self._saved <= before:
                raise
            return False

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from trainers.notice import hearing_torch
        from trainers.worker import train_loop

        fleet = self._fleet
        fixed = fleet.fewest == fleet.most
        room = _ROOM if fixed else _ROOM_ELASTIC
        environment = {**TRAIN_ENVIRONMENT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": room}
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        resources = {"CPU": fleet.share.num_cpus}
        if fleet.share.num_gpus:
            resources["GPU"] = fleet.share.num_gpus
        return TorchTrainer(
            train_loop,
            train_loop_config={"desk": self._desk},
            torch_config=hearing_torch(),
            scaling_config=ScalingConfig(
                # Elastic only where there is a choice: it looks for more room now and then.
                num_workers=fleet.fewest if fixed else (fleet.fewest, fleet.most),
                use_gpu=bool(fleet.share.num_gpus),
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"crew-{uuid.uuid4().hex}",
                storage_path=fleet.folder,
                failure_config=FailureConfig(max_failures=fleet.retries),
            ),
        )


class RecoveryTrial(tune.Trainable):
    """A Tune trial: one run. The crew stays from trial to trial, unless it has lost a worker: the
    next run has all its retries."""

    def setup(self, config: dict[str, Any], fleet: Fleet) -> None:
        self._fleet = fleet
        self._crew: Crew | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._job: dict[str, Any] | None = new_config["job"]
        self._told: dict[str, Any] = {}
        return True

    def step(self) -> dict[str, Any]:
        """Returns when there is something new."""
        if self._job is not None and self._crew is not None and self._crew.error is not None:
            self._crew = None  # lost while it had nothing to do, which is not the next job's fault
        crew = self._crew = self._crew or Crew(self._fleet)
        if self._job is not None:
            try:
                crew.put(self._job)
            except EspalierError as error:  # such as a store that this machine may not open
                return {"broken": str(error), "done": True}
            self._job = None
        while True:
            state = crew.look()
            if state.finished:
                if state.attempts > 1:
                    self.cleanup()
                return {"done": True}
            if crew.error is not None:
                self._crew = None
                # As a result: of what a trial raises Tune tells its searcher nothing.
                return {"broken": cause(crew.error), "done": True}
            if state.facts != self._told:
                self._told = state.facts
                return {**state.facts, "done": False}
            time.sleep(_LOOK_SECONDS)

    def cleanup(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()


def run_races(
    races: Sequence[Race],
    book: Book,
    grounds: Grounds,
    workers: tuple[int, int],
    progress: Progress,
    show: Callable[[Sequence[Race]], None],
) -> None:
    """Run what is left of all races, noting outcomes in the book; `show` hears of each."""
    with tempfile.TemporaryDirectory(prefix="espalier-recover-") as folder, quiet_tune():
        fleet = Fleet(folder, *workers, grounds.config.retries, grounds.share)

        def config(run: Run) -> dict[str, Any]:
            return {"job": grounds.job(run.candidate, run.tier).model_dump(mode="json")}

        tune.Tuner(
            tune.with_resources(tune.with_parameters(RecoveryTrial, fleet=fleet), _DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=RaceSearcher(races, book, config, progress, show),
                num_samples=-1,  # until the searcher says that it has finished
                max_concurrent_trials=grounds.config.concurrent,
                reuse_actors=True,
                trial_name_creator=_short,
                trial_dirname_creator=_short,
            ),
            run_config=tune.RunConfig(
                name="recover",
                storage_path=folder,
                verbose=0,
                # Tune would save a class trainable at its end, and ours are in the store.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


def _newest_step_of(job: RecoveryJob) -> Callable[[], int]:
    """What says how far the job's checkpoints reach."""
    store = open_store(job.store, job.options, patient=True)
    return lambda: newest_step(store, job.checkpoints) or 0


def cause(error: BaseException) -> str:
    """In one sentence, what a Ray Train job ended with: what a worker raised, and rather what is
    the user's to mend than that another worker did not answer any more."""
    failures = getattr(error, "worker_failures", None) or {
        0: getattr(error, "controller_failure", error)
    }
    raised = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    for exception in raised:
        if isinstance(exception, EspalierError):
            return str(exception)
    lines = str(raised[0]).strip().splitlines()
    return f"{type(raised[0]).__name__}: {lines[0]}" if lines else type(raised[0]).__name__


def _short(trial: object) -> str:
    return str(getattr(trial, "trial_id"))  # noqa: B009  # Ray is not typed
