"""What Tune, Optuna and Ray cost per warm scoring trial, beside the scoring itself, and whether the
driver's time and memory stay flat.

    python -m benchmarks.search examples/miniature.yaml --trials 2000
    python -m benchmarks.search examples/miniature.yaml --trials 10000 --drawn

Needs the library of that sweep (`make demo`, or `espalier library CONFIG`). Scores under a prefix
of its own, which it removes, so that every trial is really scored; `--drawn` draws scores instead,
and what is left is what the search itself costs. All else is as in a sweep, the study that
optuna-dashboard reads included. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from psutil import Process

from cluster.cli.common import open_config
from cluster.connect import connected
from search.score import Bench, Score
from search.stages.library import library_prefixes
from search.studies import StudyLog, journal_file
from search.trials import Trial, library_space, run_search
from storage.manifest import withdraw
from storage.store import Store, open_store
from trainers.library.library import Library
from trainers.placement import share_of
from trainers.students.plan import Plan

PARTS = (250, 500, 1_000, 2_000, 5_000)
"""Trials after which figures of their own begin."""


@dataclass(frozen=True)
class DrawnBench(Bench):
    """Where a plan's score is drawn, by its digest, and nothing is loaded."""

    def open(self) -> DrawnScorer:  # type: ignore[override]  # all that an actor asks of a scorer
        return DrawnScorer(open_store(self.url, self.options))


@dataclass(frozen=True)
class DrawnScorer:
    """What a scoring actor needs of a scorer."""

    store: Store

    def score(self, plan: Plan) -> Score:
        """Loss rises with what is left out, as measured ones do, so that samplers have work."""
        left_out = plan.teacher_blocks / len(plan.blocks)
        return Score(left_out * random.Random(plan.digest).uniform(0.01, 0.02), 0.0)


class Clock:
    """Notes when each trial's score arrived, and how much memory the driver then held."""

    def __init__(self) -> None:
        self.arrived: list[float] = []
        self.mebibytes: list[float] = []

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.arrived.append(time.monotonic())
        self.mebibytes.append(Process().memory_info().rss / 2**20)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--trials", type=int, default=200)
    arguments.add_argument("--drawn", action="store_true")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = arguments.parse_args()
    sweep = open_config(options.config, options.set)
    prefix = f"benchmarks/{uuid.uuid4().hex}"
    clock = Clock()
    with (
        tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder,
        connected(sweep.config.accelerator),
    ):
        prefixes = library_prefixes(sweep)
        share = share_of(sweep.config.workers, sweep.config.accelerator)
        bench = (DrawnBench if options.drawn else Bench)(
            teacher=sweep.teacher,
            url=sweep.store.url,
            encoding=sweep.encoded_prefix,
            replacements=tuple(prefixes.items()),
            scores=f"{prefix}/scores",
            probe=sweep.config.search.probe,
            seed=sweep.config.seed,
            options=sweep.config.store,
            device=share.device,
            threads=share.threads,
        )
        try:
            trials = run_search(
                library_space(sweep.teacher, Library(sweep.store, prefixes)),
                sweep.targets,
                bench,
                sweep.config.search.model_copy(update={"trials": options.trials}),
                sweep.store,
                prefix,
                cpus=float(share.threads),
                gpus=share.num_gpus,
                seed=sweep.config.seed,
                log=StudyLog(journal_file(folder, sweep.name), sweep.name, "", "", ""),
                progress=clock,
            )
        finally:
            withdraw(sweep.store, prefix)
    workers = sweep.config.workers
    count = len(clock.arrived)  # fewer than asked for when there are no more plans
    # The first trials of each worker load the models, so they are not warm.
    edges = [4 * workers, *(p for p in PARTS if p < count), count]
    parts = [cost(trials, clock, first, last, workers) for first, last in pairwise(edges)]
    whole = cost(trials, clock, edges[0], edges[-1], workers)
    print(json.dumps({"workers": workers, **whole, "parts": parts}, indent=1))


def cost(
    trials: Sequence[Trial], clock: Clock, first: int, last: int, workers: int
) -> dict[str, float]:
    """Milliseconds a trial from one to another, and the most memory that the driver held there."""
    count = last - first
    wall = (clock.arrived[last - 1] - clock.arrived[first - 1]) / count
    scoring = sum(trial.seconds for trial in trials[first:last]) / count / workers
    return {
        "trials": last,
        "warm_ms_per_trial": round(1000 * wall, 1),
        "scoring_ms_per_trial": round(1000 * scoring, 1),
        "overhead_ms_per_trial": round(1000 * (wall - scoring), 1),
        "driver_mib": round(max(clock.mebibytes[first - 1 : last])),
    }


if __name__ == "__main__":
    main()
