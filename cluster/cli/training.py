"""What `espalier plan --train` says: memory and time of training a plan, from formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.document import read_document
from storage.errors import EspalierError
from trainers.estimate import (
    GPUS,
    USED,
    Pictures,
    Run,
    estimate,
    library_flops,
    library_memory,
)
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import LibraryError
from trainers.library.room import Room, largest_group
from trainers.schedule import NOTHING_REPLACED
from trainers.students.families import family_named

if TYPE_CHECKING:
    from search.recover import RecoverConfig
    from trainers.students.plan import Plan

NOTICE = 30
"""Seconds that Ray gives a machine that is taken away, unless told otherwise; see
trainers/notice.py."""

RESOLUTION = 1024
"""Pixels a side where no recipe says it."""


class TrainingError(EspalierError):
    """Training that cannot be estimated."""


def describe_training(
    plan: Plan,
    config: Mapping[str, Any],
    path: Path,
    kind: str,
    gpus: int | None,
    gpu_memory: float | None,
    text_tokens: int,
    mfu: float,
) -> dict[str, Any]:
    """Memory in bytes and time in seconds of the library, and of every phase of the recipe's middle
    schedule. `gpus` is for both; None leaves each the workers that the recipe gives it."""
    if kind not in GPUS:
        raise TrainingError(f"--gpu {kind}: not known; give one of {', '.join(GPUS)}")
    gpu = GPUS[kind]
    recover, library, library_workers, resolution = settings_of(path)
    schedule = recover.space.schedule(recover.space.middle())
    if any(phase.train == "replacements" for phase in schedule.phases) and plan.untouched:
        raise TrainingError(f"recover.space.phases: {NOTHING_REPLACED}")
    workers = gpus or recover.range[1]
    pictures = Pictures.of(resolution, text_tokens)
    run = Run(
        config,
        plan,
        recover.step,
        pictures,
        workers,
        recover.shard_teacher,
        gpu.tflops,
        mfu,
    )
    offered = int((gpu_memory or gpu.gib) * 2**30)
    phases = []
    for found in estimate(run, schedule):
        phase = found.phase
        if phase.batch_size < workers:
            raise TrainingError(
                f"--gpus {workers}: {phase.batch_size} pictures a step cannot be shared by so many;"
                f" give at most {phase.batch_size}"
            )
        phases.append(
            {
                "loss": phase.loss,
                "train": phase.train,
                "steps": phase.steps,
                "batch_size": phase.batch_size,
                "memory": {**found.memory, "total": found.total},
                "fits": found.total <= USED * offered,
                "checkpoint": found.checkpoint,
                "flops_per_step": found.flops,
                "seconds_per_step": found.seconds / phase.steps,
                "seconds": found.seconds,
            }
        )
    return {
        "gpu": kind,
        "gpus": workers,
        "gpu_memory": offered,
        "tflops": gpu.tflops,
        "mfu": mfu,
        "resolution": resolution,
        "text_tokens": text_tokens,
        "shard_teacher": recover.shard_teacher,
        "step": recover.step.model_dump(mode="json"),
        "library": _library(
            plan,
            config,
            library,
            Room(offered, pictures),
            gpus or library_workers,
            gpu.tflops * 1e12 * mfu,
        ),
        "phases": phases,
        "seconds": sum(phase["seconds"] for phase in phases),
    }


def _library(
    plan: Plan,
    config: Mapping[str, Any],
    library: LibraryConfig,
    room: Room,
    workers: int,
    rate: float,
) -> dict[str, Any] | None:
    """What training the plan's replacements takes, as many at a time as there is room for; None
    when it has none. `rate`: floating-point operations a second of each GPU."""
    family = family_named(plan.family)
    blocks = [block for block in plan.blocks if block.start == "library"]
    if not blocks:
        return None
    try:
        size, fits = largest_group(family, config, blocks, workers, library, room), True
    except LibraryError:
        size, fits = 1, False
    groups = grouped(blocks, workers, size)
    memory = [
        library_memory(
            family, config, group, library.batch_size, library.micro_batch, room.pictures
        )
        for group in groups
    ]
    fullest = max(memory, key=lambda parts: sum(parts.values()))
    flops = sum(library_flops(family, config, group, room.pictures) for group in groups)
    return {
        "gpus": workers,
        "replacements": len(blocks),
        "group": max(map(len, groups)),
        "steps": library.steps,
        "batch_size": library.batch_size,
        "micro_batch": library.micro_batch,
        "memory": {**fullest, "total": sum(fullest.values())},
        "fits": fits,
        "seconds": library.steps * library.batch_size * flops / rate / min(workers, len(groups)),
    }


def settings_of(path: Path) -> tuple[RecoverConfig, LibraryConfig, int, int]:
    """How a recipe trains, the workers that make its library and the size of its pictures; the
    defaults for a plan alone."""
    from cluster.configfile import load_config
    from search.config import SweepConfig
    from search.recover import RecoverConfig

    data = read_document(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(data, Mapping) or "plan" not in data:
        workers: int = SweepConfig.model_fields["workers"].default
        return RecoverConfig(), LibraryConfig(), workers, RESOLUTION
    recipe = load_config(path, [], SweepConfig)
    return recipe.recover, recipe.library, recipe.workers, recipe.data.resolution


def print_training(said: Mapping[str, Any]) -> None:
    """A table with a column a phase."""
    from rich.console import Console
    from rich.table import Table

    from search.report.words import duration, memory

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"\ntraining on {said['gpus']} × {said['gpu']} ({memory(said['gpu_memory'])}), "
        f"{said['resolution']}-pixel pictures, captions of {said['text_tokens']} tokens"
    )
    if library := said["library"]:
        console.print(_library_in_words(library, said["gpu"]))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("per GPU")
    for phase in said["phases"]:
        table.add_column(f"{phase['loss']}, {phase['train']}", justify="right")
    for part in said["phases"][0]["memory"]:
        table.add_row(part, *(memory(phase["memory"][part]) for phase in said["phases"]))
    table.add_row(
        "fits in nine tenths", *("yes" if phase["fits"] else "no" for phase in said["phases"])
    )
    table.add_row("a checkpoint", *(memory(phase["checkpoint"]) for phase in said["phases"]))
    table.add_row("a step", *(duration(phase["seconds_per_step"]) for phase in said["phases"]))
    table.add_row("steps", *(f"{phase['steps']:,}" for phase in said["phases"]))
    table.add_row("time", *(duration(phase["seconds"]) for phase in said["phases"]))
    console.print(table)
    console.print(
        f"together {duration(said['seconds'])}, at {said['mfu']:.0%} of the GPU's "
        f"{said['tflops']:g} TFLOP/s; tensors alone: what CUDA takes for itself comes on top"
    )
    largest = max(phase["checkpoint"] for phase in said["phases"])
    console.print(
        f"{NOTICE} s of notice save every step where each GPU sends "
        f"{memory(math.ceil(largest / NOTICE))} a second to the storage, and twice that where a "
        "checkpoint is under way"
    )


def _library_in_words(library: Mapping[str, Any], gpu: str) -> str:
    from search.report.words import duration, memory

    pictures = library["micro_batch"] or library["batch_size"]
    said = (
        f"library on {library['gpus']} × {gpu}: {library['replacements']} replacements, "
        f"{library['group']} at a time on each, {pictures} of {library['batch_size']} pictures at "
        "a time: "
        f"{memory(library['memory']['total'])}"
    )
    if not library["fits"]:
        return (
            f"{said}, too much; lower library.micro_batch, then library.batch_size, or take a "
            "larger GPU"
        )
    return f"{said}; {library['steps']:,} steps, {duration(library['seconds'])}"
