"""Gathers what a sweep has left in its store into one `ReportData`, as far as it has come."""

from __future__ import annotations

from typing import Any

from search.analyse import load_analysis
from search.budget import Budget
from search.judging import TEACHER, Judged
from search.objectives import scored
from search.report import words
from search.report.data import (
    BudgetFacts,
    FinalistFacts,
    PictureRow,
    Redundancy,
    ReportData,
    StudentFacts,
    TrialFacts,
)
from search.stages.facts import provenance, sampling, scores, stage_costs, teacher_facts
from search.stages.measure import confirmed
from search.stages.publish import BEFORE, PUBLISH, judged_of, shown_prefix
from search.stages.recover import RECOVER, recoveries_of
from search.stages.search import SEARCH, trials_of
from search.sweep import Sweep
from search.trials import Trial, pareto_trials
from trainers.students.counts import plan_parameters

STAGES = (*BEFORE, "publish")
"""Those whose cost is told; the report cannot tell its own."""


def gather(sweep: Sweep) -> ReportData:
    """Everything the report says of a sweep, at whatever stage it is."""
    trials = trials_of(sweep) if SEARCH.record(sweep) else []
    objectives = scored(sweep.config.search.objectives)
    teacher = judged_of(sweep, TEACHER)
    students, judged = _students(sweep)

    def known(budget: Budget) -> bool:
        return budget.currency == "parameters" or sweep.measured

    return ReportData(
        provenance=provenance(sweep),
        teacher=teacher_facts(sweep),
        budgets=tuple(
            BudgetFacts(
                label=b.label,
                asked=b.asked,
                limit=sweep.target(b).limit if known(b) else None,
                most=words.cost(sweep.target(b).limit, b.currency) if known(b) else b.asked,
                currency=b.currency,
            )
            for b in sweep.config.budgets
        ),
        students=students,
        trials=tuple(_trial(trial) for trial in trials),
        objectives=objectives,
        pareto=tuple(trial.number for trial in pareto_trials(trials, objectives)),
        redundancy=_redundancy(sweep),
        finalists=_finalists(sweep),
        teacher_scores=scores(teacher),
        pictures=_pictures(sweep, teacher, judged),
        costs=stage_costs(sweep, STAGES),
        sampling=sampling(sweep),
    )


def _students(sweep: Sweep) -> tuple[tuple[StudentFacts, ...], dict[str, Judged]]:
    """The published students, and by budget what they drew."""
    record = PUBLISH.record(sweep)
    if record is None:
        return (), {}
    published: Any = record.facts["students"]
    students, judged = [], {}
    for recovery in recoveries_of(sweep):
        said = published.get(recovery.budget, {})
        prefix = recovery.student
        if said.get("finalist") != prefix or recovery.fidelity_loss is None:
            continue
        drawn = judged_of(sweep, prefix)
        if drawn is not None:
            judged[recovery.budget] = drawn
        students.append(
            StudentFacts(
                budget=recovery.budget,
                plan=recovery.plan,
                parameters=plan_parameters(recovery.plan, sweep.teacher.config),
                loss_before=recovery.loss_before,
                loss_after=recovery.fidelity_loss,
                url=f"{sweep.store.url}/{shown_prefix(sweep, recovery.budget)}",
                scores=scores(drawn),
                cost=confirmed(sweep, (recovery.plan, prefix)),
            )
        )
    return tuple(students), judged


def _trial(trial: Trial) -> TrialFacts:
    return TrialFacts(
        number=trial.number,
        parameters=trial.parameters,
        fidelity_loss=trial.fidelity_loss,
        seconds=trial.seconds,
        origin=trial.origin,
        plan=trial.plan,
        state=trial.state,
        budget=trial.budget,
        damage=trial.damage,
        costs={**trial.costs, **trial.measured},
    )


def _finalists(sweep: Sweep) -> tuple[FinalistFacts, ...]:
    if RECOVER.record(sweep) is None:
        return ()
    record = PUBLISH.record(sweep)
    published: Any = record.facts["students"] if record else {}
    chosen = {said["finalist"] for said in published.values()}
    facts = []
    for number, recovery in enumerate(recoveries_of(sweep)):
        prefix = recovery.student
        drawn = judged_of(sweep, prefix)
        verdict = scores(drawn)
        facts.append(
            FinalistFacts(
                budget=recovery.budget,
                trial=number,
                plan=recovery.plan,
                parameters=plan_parameters(recovery.plan, sweep.teacher.config),
                schedule=recovery.schedule,
                loss_before=recovery.loss_before,
                loss_after=recovery.fidelity_loss,
                seconds=recovery.seconds,
                judge_score=verdict.overall if verdict else None,
                chosen=prefix in chosen,
                state=recovery.state,
                measured={m.part: m.fidelity_loss for m in recovery.measured},
                cost=confirmed(sweep, (recovery.plan, prefix)),
            )
        )
    return tuple(facts)


def _redundancy(sweep: Sweep) -> Redundancy | None:
    analysis = load_analysis(sweep.store, sweep.analysis_prefix)
    if analysis is None:
        return None
    return Redundancy(
        image_cka=_matrix(analysis.image_cka.tolist()),
        text_cka=_matrix(analysis.text_cka.tolist()),
        importance=_matrix(analysis.importance.tolist()),
        bands=analysis.bands,
    )


def _matrix(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _pictures(
    sweep: Sweep, teacher: Judged | None, students: dict[str, Judged]
) -> tuple[PictureRow, ...]:
    if teacher is None or not students:
        return ()
    models = {"teacher": teacher, **students}
    return tuple(
        PictureRow(
            caption=caption,
            seed=sweep.config.judge.seed,
            teacher=teacher.pictures[i],
            students={budget: drawn.pictures[i] for budget, drawn in students.items()},
            passed={name: drawn.passed[i] for name, drawn in models.items() if drawn.passed},
        )
        for i, caption in enumerate(teacher.captions)
    )
