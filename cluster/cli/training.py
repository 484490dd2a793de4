"""What `espalier plan --train` says: memory and time of training a plan, from formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from storage.errors import EspalierError
from trainers.estimate import GPUS, Pictures, Run, estimate

if TYPE_CHECKING:
    from search.recover import RecoverConfig
    from trainers.students.plan import Plan

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
    """Memory in bytes and time in seconds of every phase of the recipe's middle schedule."""
    if kind not in GPUS:
        raise TrainingError(f"--gpu {kind}: not known; give one of {', '.join(GPUS)}")
    gpu = GPUS[kind]
    recover, resolution = settings_of(path)
    schedule = recover.space.schedule(recover.space.middle())
    workers = gpus or recover.range[1]
    run = Run(
        config,
        plan,
        recover.step,
        Pictures.of(resolution, text_tokens),
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
                "fits": found.total <= 0.9 * offered,
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
        "phases": phases,
        "seconds": sum(phase["seconds"] for phase in phases),
    }


def settings_of(path: Path) -> tuple[RecoverConfig, int]:
    """How a recipe trains and the size of its pictures; the defaults for a plan alone."""
    from cluster.configfile import load_config
    from search.config import SweepConfig
    from search.recover import RecoverConfig

    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(data, Mapping) or "plan" not in data:
        return RecoverConfig(), RESOLUTION
    recipe = load_config(path, [], SweepConfig)
    return recipe.recover, recipe.data.resolution


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
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("per GPU")
    for phase in said["phases"]:
        table.add_column(f"{phase['loss']}, {phase['train']}", justify="right")
    for part in said["phases"][0]["memory"]:
        table.add_row(part, *(memory(phase["memory"][part]) for phase in said["phases"]))
    table.add_row(
        "fits in nine tenths", *("yes" if phase["fits"] else "no" for phase in said["phases"])
    )
    table.add_row("a step", *(duration(phase["seconds_per_step"]) for phase in said["phases"]))
    table.add_row("steps", *(f"{phase['steps']:,}" for phase in said["phases"]))
    table.add_row("time", *(duration(phase["seconds"]) for phase in said["phases"]))
    console.print(table)
    console.print(
        f"together {duration(said['seconds'])}, at {said['mfu']:.0%} of the GPU's "
        f"{said['tflops']:g} TFLOP/s; tensors alone: what CUDA takes for itself comes on top"
    )
