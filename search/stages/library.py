"""Stage 3: replacements for every span, width and text that the analysis nominates, from each start
that the configuration offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from search.analyse import Analysis, load_analysis, nominate
from search.costs import plan_costs
from search.proposals import Start
from search.rules import RULES, Ground
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep, SweepError
from search.trials import library_space
from storage.registry import entries, rank
from trainers.library.library import Library
from trainers.library.workers import LibraryReport, train_library
from trainers.progress import Progress
from trainers.students.plan import BlockPlan, Plan
from trainers.worker import stored_plan


def run(sweep: Sweep, progress: Progress) -> Outcome:
    config = sweep.config
    # One that lost replacements is made again for the plans that it was made for.
    earlier = recorded_earlier(sweep) if LIBRARY.record(sweep) else earlier_plans(sweep)
    report = train_library(
        sweep.teacher,
        nominated(sweep, earlier),
        sweep.store,
        sweep.encoded_prefix,
        config.library,
        sweep.name,
        options=config.store,
        workers=config.workers,
        accelerator=config.accelerator,
        seed=config.seed,
        progress=progress,
    )
    _check_reachable(sweep, report)
    said = f", {report.measured} cut from the teacher and measured" if report.measured else ""
    said += f", {len(report.failed)} failed" if report.failed else ""
    if report.ridged:
        said += f"; {len(report.ridged)} with singular fits, ridged (more library.fit_batches help)"
    if report.set_back:
        said += f"; {len(report.set_back)} went on at a lower rate (a lower library.lr helps)"
    if report.interruptions:
        said += f"; {len(report.interruptions)} groups interrupted, gone on from checkpoints"
    return Outcome(
        f"{report.trained} replacements trained, {report.reused} reused{said}",
        {
            "trained": report.trained,
            "measured": report.measured,
            "reused": report.reused,
            "failed": [[str(block), why] for block, why in report.failed.items()],
            "interruptions": [str(interruption) for interruption in report.interruptions],
            "replacements": [
                [block.model_dump(mode="json"), prefix] for block, prefix in report.prefixes.items()
            ],
            # What later sweeps publish must not change this one when it is resumed.
            "earlier": [[label, plan.model_dump(mode="json")] for label, _, plan in earlier],
        },
    )


def _check_reachable(sweep: Sweep, report: LibraryReport) -> None:
    """SweepError when too many replacements failed for any plan to meet its budget."""
    if not report.failed:
        return
    block, why = next(iter(report.failed.items()))
    made = len(report.failed) + len(report.prefixes)
    lost = f"library: {len(report.failed)} of {made} replacements failed ({block}: {why})"
    if sweep.config.plan is not None:
        raise SweepError(f"{lost}, and the plan needs every one")
    space = library_space(sweep.teacher, Library(sweep.store, report.prefixes), sweep.table)
    for target in sweep.targets:
        if space.within(target.currency).smallest > target.room:
            raise SweepError(
                f"{lost}, and without them no plan meets budget {target.label}; train them with "
                "another library.lr"
            )


def nominated(sweep: Sweep, earlier: Sequence[Start] = ()) -> list[BlockPlan]:
    """The replacements that the library of this sweep holds; those of `earlier` plans too."""
    if sweep.config.plan is not None:
        return [block for block in sweep.config.plan.blocks if block.start == "library"]
    analysis = read_analysis(sweep)
    starts = rule_plans(sweep, analysis)
    if sweep.config.search.exact == 0:
        return rules_alone(starts, [target.label for target in sweep.targets])
    return nominate(
        analysis.damages,
        sweep.teacher.family.name,
        sweep.teacher.config,
        sorted(sweep.targets, key=lambda target: -target.limit),
        sweep.config.analyse.replacements,
        [plan for _, _, plan in (*starts, *earlier)],
        sweep.table,
        sweep.config.library.starts,
    )


def rules_alone(starts: Sequence[Start], budgets: Sequence[str]) -> list[BlockPlan]:
    """What the rules' plans need and no more; SweepError names a budget that no rule reaches."""
    for budget in budgets:
        if not any(label == budget for label, _, _ in starts):
            raise SweepError(
                f"budget {budget}: no rule of search.rules reaches it; ask for more, add a rule, "
                "or set search.exact above 0"
            )
    blocks = (block for _, _, plan in starts for block in plan.blocks)
    return list(dict.fromkeys(block for block in blocks if not block.untouched))


def read_analysis(sweep: Sweep) -> Analysis:
    """The analysis of this sweep."""
    analysis = load_analysis(sweep.store, sweep.analysis_prefix)
    if analysis is None:
        raise SweepError("library: needs the output of `analyse`; run `espalier analyse` first")
    return analysis


def rule_plans(sweep: Sweep, analysis: Analysis) -> list[Start]:
    """The plans of the papers' rules, for each budget that they reach."""
    search = sweep.config.search
    ground = Ground(
        sweep.teacher.family.name,
        sweep.teacher.config,
        analysis,
        search.noise_power,
        search.least_cka,
        search.next_interval,
        table=sweep.table,
    )
    found = (
        (target.label, rule, RULES[rule](replace(ground, currency=target.currency), target.room))
        for target in sweep.targets
        for rule in search.rules
    )
    return [(label, rule, plan) for label, rule, plan in found if plan is not None]


def earlier_plans(sweep: Sweep) -> list[Start]:
    """For each budget, the best published plans of this teacher that other sweeps found and that
    fit it, by the rule of the registry: at most `search.earlier`, each once."""
    most, offered = sweep.config.search.earlier, {*sweep.candidates}
    if sweep.config.plan is not None or most == 0:
        return []
    known = [
        entry
        for entry in sorted(entries(sweep.store), key=rank)
        if entry.teacher == sweep.teacher.digest and entry.sweep != sweep.name
    ]
    found: list[Start] = []
    for target in sweep.targets:
        plans: dict[str, Plan] = {}
        for entry in known:
            large = target.currency == "parameters" and entry.parameters > target.limit
            if large or len(plans) == most or entry.plan_digest in plans:
                continue
            plan = stored_plan(sweep.store, entry.prefix)
            # Only of blocks that this configuration would offer itself.
            if plan and all(block.untouched or block in offered for block in plan.blocks):
                costs = plan_costs(plan, sweep.teacher.family, sweep.teacher.config, sweep.table)
                if costs[target.currency] <= target.room:
                    plans[entry.plan_digest] = plan
        found += [(target.label, "earlier", plan) for plan in plans.values()]
    return found


def recorded_earlier(sweep: Sweep) -> list[Start]:
    """The earlier plans that were known when this sweep's library was made."""
    record = LIBRARY.record(sweep)
    assert record is not None
    stored: Any = record.facts["earlier"]
    return [(label, "earlier", Plan.model_validate(plan)) for label, plan in stored]


def library_prefixes(sweep: Sweep) -> dict[BlockPlan, str]:
    """Where the usable replacements of this sweep's library live."""
    record = LIBRARY.record(sweep)
    if record is None:
        raise SweepError("search: needs the output of `library`; run `espalier library` first")
    stored: Any = record.facts["replacements"]
    return {BlockPlan.model_validate(block): prefix for block, prefix in stored}


LIBRARY = Stage(
    name="library",
    digest=lambda sweep: sweep.library_digest,
    run=run,
    parts=lambda sweep: list(library_prefixes(sweep).values()),
)
