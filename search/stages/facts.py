"""Facts of a sweep that its model cards and its report both tell."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata

import yaml

from search.judging import Judged
from search.report.data import Provenance, Scores, StageCost, TeacherFacts
from search.sweep import Sweep
from storage.manifest import published
from trainers.teacher import Teacher

PACKAGES = ("espalier", "torch", "diffusers", "transformers", "ray", "optuna")


def teacher_facts(sweep: Sweep) -> TeacherFacts:
    return TeacherFacts(
        name=sweep.teacher.name,
        digest=sweep.teacher.digest,
        parameters=sweep.teacher_parameters,
        blocks=sweep.teacher_blocks,
        cost=sweep.table.teacher if sweep.measured and sweep.table is not None else None,
    )


def provenance(sweep: Sweep) -> Provenance:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # espalier itself, run from a checkout
            continue
    data = sweep.config.data
    encoded = published(sweep.store, sweep.encoded_prefix)
    # The source may have fewer than were asked for.
    pictures = encoded.meta.get("pictures", data.pictures) if encoded else data.pictures
    where = f" in {data.path}" if data.path else ""
    return Provenance(
        sweep=sweep.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=sweep.config.seed,
        data=f"{pictures} pictures ({data.source}{where}) at {data.resolution} × "
        f"{data.resolution}, {data.held_out} of them held out",
        environment={
            **versions,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {sweep.config.accelerator}",
        },
    )


def stage_costs(sweep: Sweep, stages: tuple[str, ...]) -> tuple[StageCost, ...]:
    """What the finished ones among the stages took."""
    from search.stages import stage_named

    # Of this configuration alone: a stage that it has not run has cost nothing yet.
    records = [stage_named(stage).record(sweep) for stage in stages]
    return tuple(
        StageCost(
            name=record.stage,
            seconds=record.seconds,
            workers=record.workers,
            skipped=record.reused,
            note=record.summary,
        )
        for record in records
        if record is not None
    )


def sampling(sweep: Sweep) -> dict[str, int | float]:
    """Arguments of the pipeline call that draws as the judged pictures were drawn."""
    size = sweep.config.data.resolution
    return {"height": size, "width": size, "num_inference_steps": sweep.config.judge.steps}


def measured_on(sweep: Sweep) -> str:
    """Where and on what latency and memory were measured; empty where they were not."""
    if sweep.table is None:
        return ""
    settings = sweep.config.measure
    sizes = " and ".join(str(s) for s in settings.resolutions or (sweep.config.data.resolution,))
    counts = " and ".join(str(count) for count in settings.batch_sizes)
    return f"on {sweep.table.device}: pictures of {sizes} px, {counts} in a pass"


def scores(judged: Judged | None) -> Scores | None:
    """None when nothing was judged, or there was no judge."""
    if judged is None or not judged.scores:
        return None
    families = {name: score for name, score in judged.scores.items() if name != "overall"}
    return Scores(families=families, overall=judged.scores["overall"])


def licence(teacher: Teacher) -> str | None:
    """What the teacher's own card says of its licence."""
    try:
        text = (teacher.folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    said = front.get("license") if isinstance(front, dict) else None
    return said if isinstance(said, str) else None
