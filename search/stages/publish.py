"""Stage 6: the best student of every budget, judged, published and registered."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue

from search.card import CardFacts
from search.judges import Drawing, judge_apart, judge_here
from search.judging import TEACHER, Judged, captions_for, read_judged
from search.objectives import judge_decides
from search.publish import Finalist, choose, register, write_model
from search.recover import Recovery
from search.report.data import StudentFacts
from search.stages.facts import (
    licence,
    measured_on,
    provenance,
    sampling,
    scores,
    stage_costs,
    teacher_facts,
)
from search.stages.measure import Student, confirm, confirmed, meeting, ratios, told
from search.stages.place import place
from search.stages.recover import broken_off, left_out, recoveries_of
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep
from storage import layout
from storage.digest import digest_json
from storage.errors import DamagedError
from storage.manifest import published
from storage.registry import keep_best, show_best
from trainers.progress import Progress
from trainers.students.counts import plan_parameters

BEFORE = ("encode", "measure", "analyse", "library", "search", "recover")
"""The stages whose cost a card tells."""


def run(sweep: Sweep, progress: Progress) -> Outcome:
    candidates = _best_recoveries(sweep, progress)
    models = [TEACHER, *(r.student for rs in candidates.values() for r in rs)]
    missing = [model for model in models if judged_of(sweep, model) is None]
    if missing:
        outs = {model: judged_prefix(sweep, model) for model in missing}
        drawing = _drawing(sweep)
        if sweep.config.workers > 1:
            judge_apart(sweep, drawing, outs, progress)
        else:
            place(sweep, judge_here, progress, drawing=drawing, outs=outs)
    students: dict[str, Any] = {}
    for budget, recoveries in candidates.items():
        finalist = choose(
            [_finalist(sweep, recovery) for recovery in recoveries],
            judge_decides(sweep.config.search.objectives),
        )
        prefix = write_model(
            sweep.store,
            sweep.teacher,
            finalist,
            _card_facts(sweep, finalist),
            sweep.config.data.resolution,
        )
        register(sweep.store, sweep.teacher, sweep.name, finalist)
        if sweep.config.keep_models is not None:
            keep_best(sweep.store, budget, sweep.teacher.digest, sweep.config.keep_models, prefix)
        show_best(sweep.store, budget)
        students[budget] = {"finalist": finalist.prefix, "prefix": prefix}
    found = ratios(sweep, [(r.plan, r.student) for rs in candidates.values() for r in rs])
    said = f"{len(students)} models published{told(found)}"
    return Outcome(said, {"students": students, "predicted": found})


def shown_prefix(sweep: Sweep, budget: str) -> str:
    """Where the student lies that this sweep published: at best/BUDGET while that shows it."""
    record = PUBLISH.record(sweep)
    assert record is not None, budget
    said: Any = record.facts["students"]
    try:
        copy = published(sweep.store, layout.best(budget))
    except DamagedError:
        copy = None
    if copy is not None and copy.meta.get("student") == said[budget]["finalist"]:
        return layout.best(budget)
    return str(said[budget]["prefix"])


def judged_prefix(sweep: Sweep, model: str) -> str:
    """Where the pictures and scores of a model are kept; `model` is a finalist's or TEACHER."""
    made_from: JsonValue = [
        sweep.teacher.digest,
        sweep.teacher.encoder_digest,
        sweep.encoded_digest,
        model,
        sweep.config.judge.model_dump(mode="json", exclude={"finalists"}),
    ]
    return f"{layout.sweep(sweep.name)}/judged/{digest_json(made_from)}"


def judged_of(sweep: Sweep, model: str) -> Judged | None:
    """What a model drew and how it was judged, if it has been."""
    return read_judged(sweep.store, judged_prefix(sweep, model))


def _best_recoveries(sweep: Sweep, progress: Progress) -> dict[str, list[Recovery]]:
    """By budget, those that are judged, without the budgets that `recover` left out. One that
    misses a budget of latency or memory, when it is measured whole, gives way to the next."""
    recoveries, lost = recoveries_of(sweep), left_out(sweep)
    best: dict[str, list[Recovery]] = {}
    for target in (target for target in sweep.targets if target.label not in lost):
        whole = [
            r
            for r in recoveries
            if r.budget == target.label
            and r.fidelity_loss is not None
            # `gc` may have taken it away since the sweep published others.
            and published(sweep.store, r.student) is not None
        ]
        whole.sort(key=lambda r: r.fidelity_loss or 0.0)
        students: list[Student] = [(r.plan, r.student) for r in whole]
        count = sweep.config.judge.finalists
        met = meeting(sweep, target, students, count, progress)
        best[target.label] = [whole[i] for i in met]
        if sweep.config.measured:
            confirm(sweep, [students[i] for i in met], progress)
    return best


def _drawing(sweep: Sweep) -> Drawing:
    from trainers.data.latents import open_latents

    latents = open_latents(sweep.store, sweep.encoded_prefix)
    config = sweep.config.judge
    captions = captions_for(config, latents.captions(latents.held_out))
    return Drawing(sweep.teacher, config, tuple(captions), sweep.config.data.resolution)


def _finalist(sweep: Sweep, recovery: Recovery) -> Finalist:
    assert recovery.fidelity_loss is not None, recovery
    judge = sweep.config.judge
    return Finalist(
        budget=recovery.budget,
        prefix=recovery.student,
        plan=recovery.plan,
        schedule=recovery.schedule,
        parameters=plan_parameters(recovery.plan, sweep.teacher.config),
        loss_before=recovery.loss_before,
        loss_after=recovery.fidelity_loss,
        scores=scores(judged_of(sweep, recovery.student)),
        judged=0 if judge.task is None else len(captions_for(judge, ())),
        cost=confirmed(sweep, (recovery.plan, recovery.student)),
    )


def _card_facts(sweep: Sweep, finalist: Finalist) -> CardFacts:
    teacher = judged_of(sweep, TEACHER)
    return CardFacts(
        asked=next(b.asked for b in sweep.config.budgets if b.label == finalist.budget),
        teacher=teacher_facts(sweep),
        student=StudentFacts(
            budget=finalist.budget,
            plan=finalist.plan,
            parameters=finalist.parameters,
            loss_before=finalist.loss_before,
            loss_after=finalist.loss_after,
            url="",
            scores=finalist.scores,
            cost=finalist.cost,
        ),
        schedule=finalist.schedule,
        provenance=provenance(sweep),
        teacher_scores=scores(teacher),
        costs=stage_costs(sweep, BEFORE),
        sampling=sampling(sweep),
        measured_on=measured_on(sweep),
        caption=teacher.captions[0] if teacher and teacher.captions else "a picture",
        base_model=sweep.teacher.hub.name if sweep.teacher.hub else None,
        licence=licence(sweep.teacher),
    )


def _digest(sweep: Sweep) -> str:
    """Another once a budget that was left out has come through, or a recovery that broke off."""
    without = [*sorted(left_out(sweep)), *broken_off(sweep)]
    return digest_json([sweep.publish_digest, *without]) if without else sweep.publish_digest


def _shown(sweep: Sweep) -> list[str]:
    """Where its budgets show a model, this sweep's or a better one."""
    record = PUBLISH.record(sweep)
    said: Any = record.facts["students"] if record else {}
    return [layout.best(budget) for budget in said]


PUBLISH = Stage(
    name="publish",
    digest=_digest,
    run=run,
    parts=_shown,
    placed=lambda sweep: sweep.config.workers == 1,
)
