"""The model card of a published student: README.md with the plan as a picture beside it.

The front matter is what the Hugging Face hub reads; the rest is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from search.report import words
from search.report.data import Provenance, Scores, StageCost, StudentFacts, TeacherFacts, kept
from search.report.loading import loading
from search.report.plan_picture import READING, in_words, plan_png
from search.report.words import count, duration, loss, percent

if TYPE_CHECKING:
    from trainers.schedule import Schedule

CARD, PLAN_PICTURE = "README.md", "plan.png"


@dataclass(frozen=True)
class CardFacts:
    """What a card says about one student."""

    asked: str
    """The budget as the config wrote it: "50%", "10B"."""
    teacher: TeacherFacts
    student: StudentFacts
    schedule: Schedule
    """Of the recovery that the student came from."""
    provenance: Provenance
    teacher_scores: Scores | None = None
    costs: tuple[StageCost, ...] = ()
    """Of the stages up to this one."""
    sampling: Mapping[str, int | float] = field(default_factory=dict)
    measured_on: str = ""
    """Where latency and memory were measured, and on what."""
    caption: str = "a lighthouse at dusk"
    """The example that the loading lines draw."""
    base_model: str | None = None
    """The teacher's id on the Hugging Face hub; None for a teacher that is not there."""
    licence: str | None = None
    """The teacher's licence as the hub spells it ("apache-2.0"), which the student inherits."""


def write_card(facts: CardFacts, folder: Path) -> list[Path]:
    """Writes README.md and plan.png into the student's folder; returns both."""
    card, picture = folder / CARD, folder / PLAN_PICTURE
    picture.write_bytes(plan_png(facts.student.plan))
    card.write_text(card_text(facts), encoding="utf-8")
    return [card, picture]


def card_text(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter; it shows `plan.png` from its own folder."""
    student, teacher = facts.student, facts.teacher
    share = percent(student.parameters / teacher.parameters)
    keeps = kept(student.scores, facts.teacher_scores)
    summary = (
        f"A text-to-image model of **{count(student.parameters)} parameters, {share} of its "
        f"teacher** {teacher.name} ({count(teacher.parameters)})"
        + (f"; it keeps **{percent(keeps)} of the teacher’s judge score**" if keeps else "")
        + ". Compressed with Espalier: runs of the teacher’s blocks were merged into single "
        "trained blocks, and the whole was distilled from the teacher."
    )
    parts = [
        _front_matter(facts),
        f"# {_title(facts)}",
        summary,
        "## Use",
        "```python\n" + loading(student.plan, student.url, facts.sampling, facts.caption) + "```",
        "## Plan",
        f"![{in_words(student.plan)}]({PLAN_PICTURE})",
        f"{READING} In words: {in_words(student.plan)}. The plan itself is `plan.json`.",
        "## Size and losses",
        _sizes(facts),
        "Fidelity loss is the mean squared difference of the student’s and the teacher’s velocity "
        "on held-out latents over a fixed grid of timesteps.",
    ]
    if student.scores is not None:
        parts += ["## Judge scores", _scores(student.scores, facts.teacher_scores)]
    parts += ["## Recovery", _schedule(facts.schedule)]
    if facts.costs:
        parts += ["## Cost", _costs(facts.costs)]
    parts += ["## Provenance", _provenance(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    import yaml

    front: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["espalier", "pruning", "distillation", facts.student.plan.family],
    }
    if facts.licence is not None:
        front["license"] = facts.licence
    if facts.base_model is not None:
        front |= {"base_model": facts.base_model, "base_model_relation": "finetune"}
    if facts.student.scores is not None:
        scores = {"overall": facts.student.scores.overall, **facts.student.scores.families}
        metrics = [
            {"type": "judge", "name": f"judge score, {name}", "value": round(value, 4)}
            for name, value in scores.items()
        ]
        result = {
            "task": {"type": "text-to-image"},
            "dataset": {"name": facts.provenance.data, "type": "espalier"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": _title(facts), "results": [result]}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _title(facts: CardFacts) -> str:
    name = facts.teacher.name.rstrip("/").rsplit("/", 1)[-1]
    return f"{name}, compressed to {facts.asked}"


def _sizes(facts: CardFacts) -> str:
    student, teacher = facts.student, facts.teacher
    measured: list[tuple[str, str, str]] = []
    if student.cost is not None and teacher.cost is not None:
        costs = teacher.cost, student.cost
        whole, small = (words.latency(cost.latency) for cost in costs)
        measured.append(("latency of a forward pass", whole, small))
        whole, small = (words.memory(cost.memory) for cost in costs)
        measured.append(("peak memory of a forward pass", whole, small))
    table = _table(
        ("", "teacher", "student"),
        [
            ("parameters", f"{teacher.parameters:,}", f"{student.parameters:,}"),
            ("blocks", str(teacher.blocks), str(len(student.plan.blocks))),
            ("fidelity loss, assembled from the library", "0", loss(student.loss_before)),
            ("fidelity loss, after recovery", "0", loss(student.loss_after)),
            *measured,
        ],
    )
    return f"{table}\n\nMeasured {facts.measured_on}." if measured else table


def _scores(student: Scores, teacher: Scores | None) -> str:
    rows = [
        (name, percent(teacher.families[name]) if teacher else "–", percent(score))
        for name, score in student.families.items()
    ]
    overall = percent(teacher.overall) if teacher else "–"
    rows.append(("**overall**", f"**{overall}**", f"**{percent(student.overall)}**"))
    return (
        _table(("family", "teacher", "student"), rows)
        + "\n\nThe share of pictures that show what their caption asks, on captions held out of "
        "training and with the same seeds for both; overall is the mean of the families."
    )


def _schedule(schedule: Schedule) -> str:
    rows = [
        (str(i + 1), phase.loss, phase.train, str(phase.steps), f"{phase.lr:.2g}")
        for i, phase in enumerate(schedule.phases)
    ]
    return _table(("phase", "matches", "trains", "steps", "peak learning rate"), rows)


def _costs(costs: tuple[StageCost, ...]) -> str:
    rows = [
        (cost.name, "reused" if cost.skipped else duration(cost.seconds), str(cost.workers))
        for cost in costs
    ]
    total = sum(cost.seconds for cost in costs if not cost.skipped)
    rows.append(("**all**", f"**{duration(total)}**", ""))
    return _table(("stage", "took", "workers"), rows)


def _provenance(facts: CardFacts) -> str:
    source = facts.provenance
    versions = ", ".join(f"{name} {version}" for name, version in source.environment.items())
    return "\n".join(
        (
            f"- sweep `{source.sweep}`, {source.created}, seed {source.seed}",
            f"- teacher {facts.teacher.name}, transformer `{facts.teacher.digest}`",
            f"- plan `{facts.student.plan.digest}`",
            f"- data: {source.data}",
            f"- made with {versions}",
        )
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table: words to the left in the first column, the rest to the right."""
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
