"""What there is to track of a sweep, read from its store: one `Run` a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, cast

from search.features import plan_features, schedule_features
from search.recover import Recovery, steps_until
from search.report.plan_picture import in_words
from search.stages import STAGES
from search.stages.facts import scores
from search.stages.publish import PUBLISH, judged_of
from search.stages.record import StageRecord
from search.stages.recover import RECOVER, recoveries_of
from search.stages.search import SEARCH, trials_of
from search.sweep import Sweep
from storage import layout
from storage.digest import digest_json
from storage.manifest import published, read_json
from trainers.students.counts import plan_parameters
from trainers.worker import LOSSES

Choice = str | int | float


@dataclass(frozen=True)
class Run:
    """One result of a sweep: a trial, a recovery, a published student, or a stage's cost."""

    kind: Literal["search", "recovery", "published", "stages"]
    key: str
    """Names it for ever: equal exactly for the same result."""
    name: str
    """Begins with the sweep's name."""
    series: str
    """What it is a point of, where a tool shows many results as one line; else `name`."""
    step: int
    """Its place in the series."""
    started: datetime
    seconds: float
    results: Mapping[str, float]
    """What was measured."""
    choices: Mapping[str, Choice] = field(default_factory=dict)
    """What it was made from."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """What was measured more than once, by optimizer step."""
    state: Literal["complete", "stopped", "failed"] = "complete"
    said: str = ""
    """It, in words."""


def runs_of(sweep: Sweep) -> list[Run]:
    """Everything to track of the stages that are done."""
    special = {SEARCH: _trials, RECOVER: _recoveries, PUBLISH: _students}
    found: list[Run] = []
    for stage in STAGES:
        record = stage.record(sweep)
        if record is not None:
            if stage in special:
                found += special[stage](sweep, record)
            found.append(_cost(sweep, record))
    return found


def _cost(sweep: Sweep, record: StageRecord) -> Run:
    name = f"{sweep.name}/stages/{record.stage}"
    return Run(
        kind="stages",
        key=_key(sweep, "stage", record.stage, record.digest, record.started.isoformat()),
        name=name,
        series=name,
        step=0,
        started=record.started,
        seconds=record.seconds,
        results={"seconds": record.seconds},
        choices={"workers": record.workers, "reused": str(record.reused)},
        said=record.summary,
    )


def _trials(sweep: Sweep, record: StageRecord) -> list[Run]:
    return [
        Run(
            kind="search",
            key=_key(sweep, "trial", record.digest, trial.number),
            name=f"{sweep.name}/search/{trial.number}",
            series=f"{sweep.name}/search/{trial.budget}/{trial.origin}",
            step=trial.number,
            started=record.started,
            seconds=trial.seconds,
            results={"parameters": trial.parameters, "summed damage": trial.damage}
            | {str(c): float(cost) for c, cost in (trial.costs | trial.measured).items()}
            | _if_known(trial.fidelity_loss),
            choices={
                "budget": trial.budget,
                "origin": trial.origin,
                "plan": trial.plan.digest,
                **plan_features(trial.plan),
            },
            state=trial.state,
            said=in_words(trial.plan),
        )
        for trial in trials_of(sweep)
    ]


def _recoveries(sweep: Sweep, record: StageRecord) -> list[Run]:
    made = []
    for recovery in recoveries_of(sweep):
        losses = _losses(sweep, recovery)
        name = f"{sweep.name}/recovery/{recovery.budget}/{recovery.trial}"
        measured = [(0, recovery.loss_before)]
        measured += [
            (steps_until(each.part, recovery.schedule), each.fidelity_loss)
            for each in recovery.measured
        ]
        made.append(
            Run(
                kind="recovery",
                key=_key(sweep, "recovery", record.digest, recovery.budget, recovery.trial),
                name=name,
                series=name,
                step=len(losses),
                started=record.started,
                seconds=recovery.seconds,
                results={"seconds": recovery.seconds},
                choices={
                    "budget": recovery.budget,
                    "finalist": recovery.finalist,
                    "plan": recovery.plan.digest,
                    **schedule_features(recovery.schedule),
                },
                curves={"loss": list(enumerate(losses, start=1)), "fidelity loss": measured},
                state=recovery.state,
                said=recovery.failed or in_words(recovery.plan),
            )
        )
    return made


def _losses(sweep: Sweep, recovery: Recovery) -> list[float]:
    """Its training losses as far as it came; none when it broke down before it stored any."""
    for part in reversed(sweep.config.recover.tiers):
        steps = steps_until(part, recovery.schedule)
        prefix = layout.measured(sweep.name, recovery.budget, recovery.trial, steps)
        manifest = published(sweep.store, prefix)
        if manifest is not None:
            return cast("list[float]", read_json(sweep.store, prefix, LOSSES, manifest))
    return []


def _students(sweep: Sweep, record: StageRecord) -> list[Run]:
    chosen: Any = record.facts["students"]
    prefixes = {said["finalist"]: said["prefix"] for said in chosen.values()}
    made = []
    for recovery in recoveries_of(sweep):
        if recovery.student not in prefixes:
            continue
        name = f"{sweep.name}/published/{recovery.budget}"
        verdict = scores(judged_of(sweep, recovery.student))
        judged = {} if verdict is None else {"overall": verdict.overall, **verdict.families}
        made.append(
            Run(
                kind="published",
                key=_key(sweep, "student", record.digest, recovery.budget),
                name=name,
                series=name,
                step=0,
                started=record.started,
                seconds=recovery.seconds,
                results={
                    "parameters": plan_parameters(recovery.plan, sweep.teacher.config),
                    **{f"judge score/{family}": score for family, score in judged.items()},
                }
                | _if_known(recovery.fidelity_loss),
                choices={
                    "budget": recovery.budget,
                    "plan": recovery.plan.digest,
                    "url": f"{sweep.store.url}/{prefixes[recovery.student]}",
                    **plan_features(recovery.plan),
                },
                said=in_words(recovery.plan),
            )
        )
    return made


def _if_known(loss: float | None) -> dict[str, float]:
    return {} if loss is None else {"fidelity loss": loss}


def _key(sweep: Sweep, *parts: str | int) -> str:
    return digest_json([sweep.name, sweep.teacher.digest, *parts])
