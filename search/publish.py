"""Publishes a budget's student: which finalist it is, the model folder with its card, the registry.

The model comes first, under a name that no other has, then its entry: a publication that is cut off
is no entry, and two at once do not meet.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from search.card import CardFacts, write_card
from search.report.data import Scores
from storage import layout
from storage.digest import digest_json
from storage.manifest import publish, published
from storage.registry import Entry, add, entries
from storage.store import Store, discard_unfinished
from trainers.export import pipeline_files
from trainers.measure import Cost
from trainers.schedule import Schedule
from trainers.students.plan import Plan
from trainers.teacher import Teacher
from trainers.worker import open_student

MADE_FOR = "espalier.json"
"""Beside model_index.json: what the model was made for and from; see cluster/cli/models.py."""


@dataclass(frozen=True)
class Finalist:
    """A recovery that ended with a student."""

    budget: str
    """Its label."""
    prefix: str
    """Where its student lies in the store."""
    plan: Plan
    schedule: Schedule
    parameters: int
    loss_before: float
    """Fidelity loss as assembled from the library."""
    loss_after: float
    scores: Scores | None
    """The judge's."""
    judged: int = 0
    """How many pictures the judge saw."""
    cost: Cost | None = None
    """What a forward pass takes, where it was measured."""

    @property
    def judge_score(self) -> float | None:
        return None if self.scores is None else self.scores.overall


def choose(finalists: Sequence[Finalist], judged: bool = True) -> Finalist:
    """The one to publish: by the rule of the registry, judge score before fidelity loss; by
    fidelity loss alone unless the judge decides."""

    def rank(finalist: Finalist) -> tuple[bool, float, float, int]:
        score = finalist.judge_score if judged else None
        return (score is None, -(score or 0.0), finalist.loss_after, finalist.parameters)

    return min(finalists, key=rank)


def model_prefix(teacher: Teacher, finalist: Finalist) -> str:
    """Where the finalist's model goes: by its plan, and by all that is said of it, so that what is
    published there never changes."""
    said = digest_json(_meta(teacher, finalist))
    return layout.model(finalist.budget, f"{finalist.plan.digest}-{said[:8]}")


def register(store: Store, teacher: Teacher, sweep: str, finalist: Finalist) -> None:
    """Enters the finalist, whose model is published, in the registry, once."""
    entry = Entry(
        budget=finalist.budget,
        plan_digest=finalist.plan.digest,
        teacher=teacher.digest,
        sweep=sweep,
        prefix=finalist.prefix,
        model=model_prefix(teacher, finalist),
        parameters=finalist.parameters,
        fidelity_loss=finalist.loss_after,
        judge_score=finalist.judge_score,
        judged=finalist.judged,
    )
    if not any(_same(entry, known) for known in entries(store, finalist.budget)):
        add(store, entry)


def write_model(
    store: Store,
    teacher: Teacher,
    finalist: Finalist,
    facts: CardFacts,
    resolution: int,
) -> str:
    """Publishes the student as a diffusers folder with its plan and card; once, it stays as it is.

    Returns its prefix. `resolution`: pixels a side of the pictures it learned from. The card's own
    address is set here.
    """
    prefix, meta = model_prefix(teacher, finalist), _meta(teacher, finalist)
    if published(store, prefix) is not None:
        return prefix
    stored, plan = open_student(store, finalist.prefix)
    files = pipeline_files(teacher, plan, stored.like(), stored.read)
    files[MADE_FOR] = f"{json.dumps({'resolution': resolution, **meta}, indent=1)}\n".encode()
    with tempfile.TemporaryDirectory(prefix="espalier-card-") as scratch:
        student = dataclasses.replace(facts.student, url=f"{store.url}/{prefix}")
        write_card(dataclasses.replace(facts, student=student), Path(scratch))
        files |= {file.name: file for file in sorted(Path(scratch).iterdir())}
        # The place is of one recovery of one sweep: no other sweep is writing there.
        discard_unfinished(store, prefix)
        publish(store, prefix, files, meta)
    return prefix


def _meta(teacher: Teacher, finalist: Finalist) -> dict[str, JsonValue]:
    meta: dict[str, JsonValue] = {
        "teacher": teacher.digest,
        "plan": finalist.plan.digest,
        "student": finalist.prefix,
        "parameters": finalist.parameters,
        "fidelity_loss": finalist.loss_after,
        "judge_score": finalist.judge_score,
    }
    if finalist.cost is not None:
        meta |= {"latency_us": finalist.cost.latency, "memory_bytes": finalist.cost.memory}
    return meta


def _same(entry: Entry, other: Entry) -> bool:
    """Whether two entries say the same; when they were made does not count."""
    return entry.model_copy(update={"created": other.created}) == other
