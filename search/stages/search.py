"""Stage 4: plans proposed, assembled and scored on warm actors."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from search.budget import Target
from search.objectives import scored
from search.proposals import Start
from search.score import Bench, Measuring
from search.space import Space
from search.stages.library import (
    library_prefixes,
    read_analysis,
    recorded_earlier,
    rule_plans,
)
from search.stages.measure import median_ratios, told
from search.stages.stage import Outcome, Stage
from search.studies import StudyLog, check_study, journal_file
from search.sweep import Sweep, SweepError
from search.trials import (
    SearchConfig,
    Trial,
    agreement,
    best_trials,
    complete,
    corrected_agreement,
    library_space,
    load_trials,
    plan_space,
    run_search,
)
from storage import layout
from trainers.library.library import Library
from trainers.placement import share_of
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    config = sweep.config
    prefixes = library_prefixes(sweep)
    share = share_of(config.workers, config.accelerator)
    bench = Bench(
        teacher=sweep.teacher,
        url=sweep.store.url,
        encoding=sweep.encoded_prefix,
        replacements=tuple(prefixes.items()),
        scores=f"{layout.search(sweep.name)}/scores",
        probe=config.search.probe,
        seed=config.seed,
        options=config.store,
        device=share.device,
        threads=share.threads,
        measuring=None
        if sweep.table is None
        else Measuring(sweep.table, config.measure, config.data.resolution),
    )
    space, searched, plans = _what_to_search(sweep, Library(sweep.store, prefixes))
    study, home = study_place(sweep)
    log = StudyLog(
        study,
        sweep.name,
        sweep.teacher.digest,
        sweep.search_digest,
        home,
        scored(config.search.objectives),
    )
    trials = run_search(
        space,
        sweep.targets,
        bench,
        searched,
        sweep.store,
        layout.search(sweep.name),
        workers=config.workers,
        # As many processors as it uses: how many actors there are then follows the cluster's room.
        cpus=share.num_cpus if share.num_gpus else float(share.threads),
        gpus=share.num_gpus,
        seed=config.seed,
        plans=plans,
        log=log,
        progress=progress,
    )
    for target in sweep.targets:
        if not best_trials(trials, target):
            raise SweepError(_nothing_fits(trials, target))
    failed = sum(trial.state == "failed" for trial in trials)
    said = f"{len(trials)} plans scored" + (f", {failed} failed" if failed else "")
    ranks: dict[str, JsonValue] = {}
    later: dict[str, JsonValue] = {}
    each: list[str] = []
    for label in (target.label for target in sweep.targets):
        mine = [trial for trial in trials if trial.budget == label]
        found, corrected = agreement(mine), corrected_agreement(mine)
        if found is not None:
            ranks[label] = round(found, 2)
            each.append(f"{label} {found:.2f}")
            if corrected is not None:
                later[label] = [round(rho, 2) for rho in corrected]
                each[-1] += f" (later ones {corrected[0]:.2f}, corrected {corrected[1]:.2f})"
    if ranks:
        said += f"; summed damage ranks them as measured (Spearman): {', '.join(each)}"
    held = median_ratios([(trial.costs, trial.measured) for trial in trials])
    return Outcome(
        said + told(held),
        {
            "trials": len(trials),
            "failed": failed,
            "agreement": ranks,
            "corrected": later,
            "predicted": held,
            "study": study,
        },
    )


def study_place(sweep: Sweep) -> tuple[str, str | None]:
    """Where the sweep's studies are kept, and the storage that they say they are of; None inside
    that storage itself."""
    given = sweep.config.search.study
    inside = given is None and "://" not in sweep.store.url
    where = given or journal_file(sweep.store.url, sweep.name)
    return where, None if inside else sweep.store.url


def _check_study(sweep: Sweep) -> None:
    where, home = study_place(sweep)
    check_study(where, sweep.name, sweep.teacher.digest, home)


def _what_to_search(sweep: Sweep, library: Library) -> tuple[Space, SearchConfig, list[Start]]:
    given = sweep.config.plan
    if given is None:
        analysis = read_analysis(sweep)
        space = library_space(sweep.teacher, library, sweep.table)
        plans = [*rule_plans(sweep, analysis), *recorded_earlier(sweep)]
        return space, sweep.config.search, plans
    # A given plan is all there is to score.
    alone = plan_space(sweep.teacher, library, given, sweep.table)
    once = sweep.config.search.model_copy(update={"trials": 1, "exact": 0})
    return alone, once, [(target.label, "given", given) for target in sweep.targets]


def _nothing_fits(trials: Sequence[Trial], target: Target) -> str:
    over = [t.over for t in complete(trials) if t.budget == target.label and t.over is not None]
    if over:
        return (
            f"search: no plan within budget {target.label} met it when it was measured as one "
            f"model, the closest is {min(over):.1%} above; ask for more, or leave more free with "
            "measure.margin"
        )
    return (
        f"search: no trial within budget {target.label} has a finite fidelity loss; train the "
        "library with a lower library.lr"
    )


def trials_of(sweep: Sweep) -> list[Trial]:
    """The trials of this sweep's finished search."""
    trials = load_trials(sweep.store, layout.search(sweep.name))
    if trials is None:
        raise SweepError("recover: needs the output of `search`; run `espalier search` first")
    return trials


SEARCH = Stage(
    name="search",
    digest=lambda sweep: sweep.search_digest,
    run=run,
    parts=lambda sweep: [layout.search(sweep.name)],
    check=_check_study,
)
