"""What Ray sees of recoveries: a Tune trial for each, whose body is a Ray Train job.

Import this late: it imports Ray Tune and Train. Small recoveries are mostly start-up, and start-up
is mostly processes that import torch and Ray. So one trial actor serves all trials of a lane's
place, it asks for no CPU, and Train looks at its workers often.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from search.recover import Lane, RecoverConfig, Trial
from search.study import StatelessSearcher, quiet_tune
from trainers.placement import Share
from trainers.progress import Progress

TRAIN_ENVIRONMENT = {
    # How often Train looks at its workers, and so how soon it sees that they have finished.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    # Importing torch and diffusers in every worker of a small machine takes most of a minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""Read in the process that calls `fit`; Train hands it on to its own. What is set already stays."""

# A driver only waits. It takes a place on the cluster's head, which is not preempted, and no CPU.
_DRIVER = {"node:__internal_head__": 0.001}
_PARTS = 100
"""In how many parts a recovery's progress is told."""


class LaneSearcher(StatelessSearcher):
    """Hands Tune the next trial of any lane that is free."""

    def __init__(self, lanes: Sequence[Lane], common: Mapping[str, Any], progress: Progress):
        super().__init__()
        self._lanes, self._common, self._progress = list(lanes), common, progress
        self._running: dict[str, tuple[Lane, Trial]] = {}
        self._parts: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        """Why trials broke down that have no outcome, by trial name."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        free = [lane for lane in self._lanes if lane.advance()]
        self._tell()
        if not free:
            done = all(lane.done for lane in self._lanes)
            # None asks again once a running trial has ended.
            return str(Searcher.FINISHED) if done else None
        # The lane that is furthest behind, so that budgets take turns.
        lane = min(free, key=lambda lane: len(lane.ended))
        trial = lane.take()
        self._running[trial_id] = (lane, trial)
        return {**self._common, "name": trial.name, "job": trial.job.model_dump(mode="json")}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if result.get("steps"):
            self._parts[trial_id] = _PARTS * result["step"] // result["steps"]
            facts = {"loss": result["loss"]} if "loss" in result else {}
            self._tell(**facts)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        lane, trial = self._running.pop(trial_id)
        self._parts.pop(trial_id, None)
        if error:
            self.errors[trial.name] = _reason(result)
        lane.end()
        self._tell()

    def _tell(self, **facts: float | str) -> None:
        ended = sum(len(lane.ended) for lane in self._lanes)
        total = sum(lane.count for lane in self._lanes)
        done = ended * _PARTS + sum(self._parts.values())
        best: dict[str, float] = {}
        for lane in self._lanes:
            if lane.best is not None:
                budget = lane.finalist.budget
                best[budget] = min(lane.best, best.get(budget, lane.best))
        facts |= best
        self._progress.update(done, total * _PARTS, **facts)


def race(
    lanes: Sequence[Lane],
    sweep: str,
    config: RecoverConfig,
    workers: int,
    share: Share,
    progress: Progress,
) -> dict[str, str]:
    """Run what is left of all lanes; why trials broke down, by trial name."""
    with tempfile.TemporaryDirectory(prefix="espalier-recover-") as folder, quiet_tune():
        common = {
            "sweep": sweep,
            "folder": folder,
            "workers": workers,
            "retries": config.retries,
            "cpus": share.num_cpus,
            "gpus": share.num_gpus,
        }
        searcher = LaneSearcher(lanes, common, progress)
        tune.Tuner(
            tune.with_resources(recovery_trial, _DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=sum(lane.count for lane in lanes),
                max_concurrent_trials=config.concurrent,
                reuse_actors=True,
                trial_name_creator=_short,
                trial_dirname_creator=_short,
            ),
            run_config=tune.RunConfig(name="recover", storage_path=folder, verbose=0),
        ).fit()
        return searcher.errors


def recovery_trial(config: dict[str, Any]) -> None:
    """The body of one trial: a Ray Train job on the config's workers."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from trainers.worker import train_loop

    for name, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if len(ray.nodes()) == 1:
        # An actor that would watch for the preemption of the very machine it runs on.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    resources = {"CPU": config["cpus"]}
    if config["gpus"]:
        resources["GPU"] = config["gpus"]
    TorchTrainer(
        train_loop,
        train_loop_config=config["job"],
        scaling_config=ScalingConfig(
            num_workers=config["workers"],
            use_gpu=bool(config["gpus"]),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{config['sweep']}-{config['name']}",
            storage_path=config["folder"],
            failure_config=FailureConfig(max_failures=config["retries"]),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def _reason(result: Mapping[str, Any] | None) -> str:
    return str((result or {}).get("error") or "its Ray Train job ended with an error")


def _short(trial: object) -> str:
    return str(getattr(trial, "trial_id"))  # noqa: B009  # Ray is not typed
