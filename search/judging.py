"""How finished models are judged: by a task's judge, on captions that training never showed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from storage.manifest import publish, published, read_bytes, read_json
from storage.section import Section
from storage.store import Store
from trainers.tasks import TASKS

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGED = "judged.json"
TEACHER = "teacher"
"""What stands for the teacher where a student is named by the prefix of its recovery."""


class JudgeConfig(Section):
    """What published students draw, and what judges it."""

    task: str | None = None
    """The task whose judge scores the pictures, such as `shapes`. null: pictures are drawn from
    held-out captions and shown, and finalists are ranked by fidelity loss alone."""

    finalists: PositiveInt = 2
    """Recovered students of each budget that are judged, those of lowest fidelity loss."""

    per_family: PositiveInt = 20
    """Captions of each of the task's families that a model is judged on."""

    steps: Annotated[int, Field(ge=2)] = 20
    """Denoising steps of a picture. At least 2: a schedule with a terminal shift has no single
    one."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every model draws a caption from the same noise, which follows from this."""

    shown: PositiveInt = 12
    """Captions whose pictures are kept for the report."""

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, task: str | None) -> str | None:
        if task is not None and task not in TASKS:
            raise ValueError(f"no task is called {task!r}; known are {', '.join(TASKS)}, or null")
        return task


@dataclass(frozen=True)
class Drawn:
    """What a model drew for some of the captions."""

    part: range
    """Numbers of these captions."""
    passed: Sequence[bool]
    """The judge's verdict on each picture; empty without a task."""
    kept: Mapping[int, Image]
    """The pictures that are kept, by their caption's number."""


@dataclass(frozen=True)
class Judged:
    """What a model drew, and what the judge says of it."""

    scores: Mapping[str, float]
    """By family, and `overall`; empty without a task."""
    captions: Sequence[str]
    """Of the pictures that are kept."""
    pictures: Sequence[Image]
    passed: Sequence[bool]
    """The judge's verdict on each picture; empty without a task."""


def captions_for(config: JudgeConfig, held_out: Sequence[str]) -> list[str]:
    """What a model is asked to draw: the task's held-out captions, else the data's own."""
    if config.task is None:
        return list(held_out[: config.shown])
    return TASKS[config.task].held_out_captions(config.per_family, config.seed)


def judge_model(pipeline: Any, config: JudgeConfig, captions: Sequence[str], size: int) -> Judged:
    """Draws every caption, `size` × `size` pixels, and judges all pictures; keeps some of them."""
    from trainers.evaluate import batches

    parts = batches(len(captions), size)
    return gathered(config, captions, [draw(pipeline, config, captions, p, size) for p in parts])


def draw(
    pipeline: Any, config: JudgeConfig, captions: Sequence[str], part: range, size: int
) -> Drawn:
    """What a model makes of some of the captions; the same, whoever draws the others."""
    from trainers.evaluate import generate

    some = [captions[i] for i in part]
    pictures = generate(pipeline, some, config.seed, config.steps, size, part.start)
    pairs = [*zip(pictures, some, strict=True)]
    task, shown = None if config.task is None else TASKS[config.task], _shown(config, captions)
    return Drawn(
        part=part,
        passed=[] if task is None else [task.judge(*pair) for pair in pairs],
        kept={number: pictures[number - part.start] for number in part if number in shown},
    )


def gathered(config: JudgeConfig, captions: Sequence[str], drawn: Iterable[Drawn]) -> Judged:
    """What all parts of the captions come to together."""
    from trainers.evaluate import family_scores

    parts = sorted(drawn, key=lambda each: each.part.start)
    passed = [verdict for part in parts for verdict in part.passed]
    kept = {number: picture for part in parts for number, picture in part.kept.items()}
    task = None if config.task is None else TASKS[config.task]
    return Judged(
        scores={} if task is None else family_scores(passed, captions, task),
        captions=[captions[number] for number in kept],
        pictures=list(kept.values()),
        passed=[] if task is None else [passed[number] for number in kept],
    )


def write_judged(store: Store, prefix: str, judged: Judged) -> None:
    """Publishes scores and pictures."""
    files = {_picture_name(i): _png(picture) for i, picture in enumerate(judged.pictures)}
    said = {
        "scores": dict(judged.scores),
        "captions": list(judged.captions),
        "passed": list(judged.passed),
    }
    publish(store, prefix, {**files, JUDGED: json.dumps(said, indent=1).encode()})


def read_judged(store: Store, prefix: str) -> Judged | None:
    """What `write_judged` published, or None."""
    from PIL import Image

    manifest = published(store, prefix)
    if manifest is None:
        return None
    said: Any = read_json(store, prefix, JUDGED, manifest)
    pictures = [
        Image.open(io.BytesIO(read_bytes(store, prefix, _picture_name(i), manifest)))
        for i in range(len(said["captions"]))
    ]
    return Judged(said["scores"], said["captions"], pictures, said["passed"])


def _shown(config: JudgeConfig, captions: Sequence[str]) -> set[int]:
    return {i * len(captions) // config.shown for i in range(config.shown)}


def _picture_name(index: int) -> str:
    return f"picture-{index:03d}.png"


def _png(picture: Image) -> bytes:
    body = io.BytesIO()
    picture.save(body, format="PNG")
    return body.getvalue()
