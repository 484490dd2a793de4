"""What Ray sees of recoveries: a Tune trial for each, whose body is a Ray Train job.

Import this late: it imports Ray Tune and Train. Small recoveries are mostly start-up, and start-up
is mostly processes that import torch and Ray. So one trial actor serves trial after
trial, it asks for no CPU, and Train looks at its workers often.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from search.recover import Book, Grounds
from search.study import StatelessSearcher, quiet_tune
from search.tiers import Race, Run
from trainers.progress import Progress

TRAIN_ENVIRONMENT = {
    # How often Train looks at its workers, and so how soon it sees that they have finished.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
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


class RaceSearcher(StatelessSearcher):
    """Hands Tune the next run of any race."""

    def __init__(
        self,
        races: Sequence[Race],
        book: Book,
        config: Callable[[Run], dict[str, Any]],
        progress: Progress,
    ):
        """`config` says what `recovery_trial` is given for a run."""
        super().__init__()
        self._races, self._book, self._config = list(races), book, config
        self._progress = progress
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
        if error:
            self._book.ended(run, _reason(result))
        else:
            self._book.ended(run)
        self._tell()

    def _tell(self, **facts: float | str) -> None:
        ended = sum(len(race.ended) for race in self._races)
        total = sum(race.total for race in self._races)
        done = ended * _PARTS + sum(self._parts.values())
        facts |= {race.budget: race.best for race in self._races if race.best is not None}
        self._progress.update(done, total * _PARTS, **facts)


def run_races(
    races: Sequence[Race],
    book: Book,
    grounds: Grounds,
    workers: tuple[int, int],
    progress: Progress,
) -> None:
    """Run what is left of all races, noting outcomes in the book."""
    with tempfile.TemporaryDirectory(prefix="espalier-recover-") as folder, quiet_tune():

        def config(run: Run) -> dict[str, Any]:
            job = grounds.job(run.candidate, run.tier)
            name = f"{grounds.sweep}-{grounds.name(run.candidate)}-{job.until}"
            return {
                "name": name,
                "folder": folder,
                "workers": workers,
                "retries": grounds.config.retries,
                "cpus": grounds.share.num_cpus,
                "gpus": grounds.share.num_gpus,
                "job": job.model_dump(mode="json"),
            }

        tune.Tuner(
            tune.with_resources(recovery_trial, _DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=RaceSearcher(races, book, config, progress),
                num_samples=-1,  # until the searcher says that it has finished
                max_concurrent_trials=grounds.config.concurrent,
                reuse_actors=True,
                trial_name_creator=_short,
                trial_dirname_creator=_short,
            ),
            run_config=tune.RunConfig(name="recover", storage_path=folder, verbose=0),
        ).fit()


def recovery_trial(config: dict[str, Any]) -> None:
    """The body of one trial: a Ray Train job on the config's workers, and another one whenever they
    have left machines that will go."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from trainers.notice import hearing_torch
    from trainers.worker import train_loop

    fewest, most = config["workers"]
    room = _ROOM if fewest == most else _ROOM_ELASTIC
    environment = {**TRAIN_ENVIRONMENT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": room}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    resources = {"CPU": config["cpus"]}
    if config["gpus"]:
        resources["GPU"] = config["gpus"]
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=config["job"],
        torch_config=hearing_torch(),
        scaling_config=ScalingConfig(
            # Elastic only where there is a choice: it looks for more room now and then.
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=bool(config["gpus"]),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=config["name"],
            storage_path=config["folder"],
            failure_config=FailureConfig(max_failures=config["retries"]),
            callbacks=[TuneReportCallback()],
        ),
    )
    while not trainer.fit().return_value:
        pass


def _reason(result: Mapping[str, Any] | None) -> str:
    return str((result or {}).get("error") or "its Ray Train job ended with an error")


def _short(trial: object) -> str:
    return str(getattr(trial, "trial_id"))  # noqa: B009  # Ray is not typed
