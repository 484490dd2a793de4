"""Stage 5: the finalists of every budget, distilled by competing schedules."""

from __future__ import annotations

from typing import Any

from search.recover import Finalist, Recovery, recover_finalists
from search.stages.library import library_prefixes
from search.stages.search import trials_of
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep, SweepError
from search.trials import best_trials
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    config = sweep.config
    recoveries = recover_finalists(
        finalists(sweep),
        sweep=sweep.name,
        teacher=sweep.teacher,
        store=sweep.store,
        options=config.store,
        encoding=sweep.encoded_prefix,
        replacements=library_prefixes(sweep),
        config=config.recover,
        accelerator=config.accelerator,
        probe=config.search.probe,
        seed=config.seed,
        progress=progress,
    )
    failed = sum(recovery.failed is not None for recovery in recoveries)
    said = f"{len(recoveries)} recoveries" + (f", {failed} failed" if failed else "")
    stored: list[Any] = [recovery.model_dump(mode="json") for recovery in recoveries]
    return Outcome(said, {"recoveries": stored})


def finalists(sweep: Sweep) -> list[Finalist]:
    """The best plans of every budget, by fidelity loss as assembled."""
    trials = trials_of(sweep)
    return [
        Finalist(label, rank, trial.plan, trial.fidelity_loss or 0.0)
        for label, limit in sweep.limits.items()
        for rank, trial in enumerate(best_trials(trials, limit, sweep.config.recover.finalists))
    ]


def recoveries_of(sweep: Sweep) -> list[Recovery]:
    """The recoveries of this sweep, the failed ones included."""
    record = RECOVER.record(sweep)
    if record is None:
        raise SweepError("publish: needs the output of `recover`; run `espalier recover` first")
    stored: Any = record.facts["recoveries"]
    return [Recovery.model_validate(recovery) for recovery in stored]


RECOVER = Stage(name="recover", digest=lambda sweep: sweep.recover_digest, run=run)
