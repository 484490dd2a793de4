"""Stage 5: the finalists of every budget, distilled by competing schedules."""

from __future__ import annotations

from typing import Any

from search.racelog import RaceLog
from search.recover import Agreement, Recovery, agreements, lost_budgets, recover_finalists
from search.stages.library import library_prefixes
from search.stages.measure import meeting, ratios, told
from search.stages.search import study_place, trials_of
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep, SweepError
from search.tiers import Finalist
from search.trials import best_trials
from storage.garbage import kept_students
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    config = sweep.config
    chosen = finalists(sweep, progress)
    study, home = study_place(sweep)
    recoveries = recover_finalists(
        chosen,
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
        show=RaceLog(study, sweep.name, sweep.teacher.digest, home, config.recover.space).show,
    )
    said = f"{len(recoveries)} recoveries"
    for state in ("stopped", "failed"):
        count = sum(recovery.state == state for recovery in recoveries)
        said += f", {count} {state}" if count else ""
    broke = sum(recovery.broke for recovery in recoveries)
    said += f"; {broke} broke off and will be tried again by the next run" if broke else ""
    for budget in lost_budgets(recoveries):
        said += f"; budget {budget} is left out, every recovery failed"
    agreed = agreements(recoveries)
    if agreed:
        said += "; tiers rank alike (Spearman): " + ", ".join(map(_told, agreed))
    said += told(ratios(sweep, [(finalist.plan, None) for finalist in chosen]))
    stored: list[Any] = [recovery.model_dump(mode="json") for recovery in recoveries]
    found: list[Any] = [agreement.model_dump(mode="json") for agreement in agreed]
    return Outcome(said, {"recoveries": stored, "agreement": found})


def _told(agreed: Agreement) -> str:
    lower = "assembled" if agreed.lower == 0 else f"{agreed.lower:.0%}"
    return f"{agreed.budget} {lower} to {agreed.upper:.0%} {agreed.rho:.2f}"


def finalists(sweep: Sweep, progress: Progress) -> list[Finalist]:
    """The best plans of every budget, by fidelity loss as assembled: those that are recovered, and
    as many more for when that loss proves to mislead. For a budget of latency or memory they are
    measured whole first, and one that misses it gives way to the next."""
    trials, count = trials_of(sweep), 2 * sweep.config.recover.finalists
    chosen: list[Finalist] = []
    for target in sweep.targets:
        best = best_trials(trials, target, None)
        met = meeting(sweep, target, [(trial.plan, None) for trial in best], count, progress)
        chosen += [
            Finalist(target.label, rank, best[i].plan, best[i].fidelity_loss or 0.0)
            for rank, i in enumerate(met)
        ]
    return chosen


def recoveries_of(sweep: Sweep) -> list[Recovery]:
    """The recoveries of this sweep, the failed ones included."""
    record = RECOVER.record(sweep)
    if record is None:
        raise SweepError("publish: needs the output of `recover`; run `espalier recover` first")
    stored: Any = record.facts["recoveries"]
    return [Recovery.model_validate(recovery) for recovery in stored]


def left_out(sweep: Sweep) -> dict[str, str]:
    """The budgets that stay without a student, and why; none while the stage has yet to run."""
    return lost_budgets(recoveries_of(sweep)) if RECOVER.record(sweep) else {}


def broken_off(sweep: Sweep) -> list[str]:
    """The recoveries that are still to be tried again; none while the stage has yet to run."""
    return [r.trial for r in recoveries_of(sweep) if r.broke] if RECOVER.record(sweep) else []


def check_all_came_through(sweep: Sweep) -> None:
    """SweepError for budgets that were left out; to be called when all else is done."""
    lost = left_out(sweep)
    if lost:
        each = "; ".join(
            f"budget {budget}: every recovery failed, {lost[budget]}" for budget in lost
        )
        raise SweepError(
            f"{each}; the other budgets came through; change `recover`, or run the same command "
            "again to try once more"
        )


def _students(sweep: Sweep) -> list[str]:
    """Those that the recoveries ended with; once some are published, these alone."""
    kept = kept_students(sweep.store, sweep.name)
    made = [r.student for r in recoveries_of(sweep) if r.state == "complete"]
    return [student for student in made if kept is None or student in kept]


RECOVER = Stage(
    name="recover",
    workers=lambda sweep: sweep.config.recover.range[1],
    digest=lambda sweep: sweep.recover_digest,
    run=run,
    parts=_students,
    unfinished=lambda sweep: bool(broken_off(sweep) or left_out(sweep)),
)
