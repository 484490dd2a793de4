"""What a sweep has reached: its results, and how far each stage is. Plain values, for JSON."""

from __future__ import annotations

from typing import Any

from search.stages.measure import confirmed
from search.stages.publish import PUBLISH, judged_of, shown_prefix
from search.stages.record import read_attempt
from search.stages.recover import recoveries_of
from search.stages.report import shown_url
from search.stages.search import SEARCH
from search.sweep import Sweep
from search.trials import best_trials, load_trials
from storage import layout
from storage.registry import entries
from trainers.students.counts import plan_parameters


def results(sweep: Sweep) -> dict[str, Any]:
    """The published students of a finished sweep, and where its report is."""
    record = PUBLISH.record(sweep)
    stored: Any = record.facts["students"] if record else {}
    by_prefix = {r.student: r for r in recoveries_of(sweep)}
    students = []
    for budget, said in stored.items():
        recovery = by_prefix[said["finalist"]]
        judged = judged_of(sweep, said["finalist"])
        cost = confirmed(sweep, (recovery.plan, said["finalist"]))
        students.append(
            {
                "budget": budget,
                "plan": recovery.plan.digest,
                "parameters": plan_parameters(recovery.plan, sweep.teacher.config),
                "latency_us": cost.latency if cost else None,
                "memory_bytes": cost.memory if cost else None,
                "fidelity_loss": recovery.fidelity_loss,
                "judge_score": judged.scores.get("overall") if judged else None,
                "url": f"{shown_url(sweep)}/{shown_prefix(sweep, budget)}",
            }
        )
    report = f"{shown_url(sweep)}/{layout.report(sweep.name)}/report.html"
    return {"sweep": sweep.name, "students": students, "report": report}


def status(sweep: Sweep) -> dict[str, Any]:
    """How far each stage is, the best trials, and what the registry holds for the budgets."""
    from search.stages import stages_of

    stages = []
    for stage in stages_of(sweep):
        state, record = stage.state(sweep), stage.record(sweep)
        attempt = read_attempt(sweep.store, sweep.name, stage.name) if state == "partial" else None
        stages.append(
            {
                "stage": stage.name,
                "state": state,
                "seconds": record.seconds if record else attempt.seconds if attempt else None,
                "summary": record.summary if record else "",
                "done": attempt.done if attempt else None,
                "total": attempt.total if attempt else None,
                "facts": attempt.facts if attempt else {},
            }
        )
    # Those of another search, before the configuration changed, say nothing of this one.
    searched = SEARCH.record(sweep) is not None
    trials = (load_trials(sweep.store, layout.search(sweep.name)) or []) if searched else []
    best: list[dict[str, Any]] = []
    for target in sweep.targets if trials else ():
        best += [
            {
                "budget": target.label,
                "trials": len(trials),
                "fidelity_loss": trial.fidelity_loss,
                "parameters": trial.parameters,
                "plan": trial.plan.digest,
            }
            for trial in best_trials(trials, target)
        ]
    return {
        "sweep": sweep.name,
        "teacher": sweep.teacher.name,
        "storage": shown_url(sweep),
        "stages": stages,
        "best_trials": best,
        "registry": [
            entry.model_dump(mode="json")
            for budget in sweep.config.budgets
            for entry in entries(sweep.store, budget.label)
        ],
    }
