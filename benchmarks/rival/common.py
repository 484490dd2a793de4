"""What both searches share: the teacher, how a student is distilled, and what counts as cost.

Cost is processor time of training and scoring, in seconds of one core; loading models and starting
processes is none. One thread computes, so that the time does not depend on what runs beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.study.setting import Setting
from cluster.cli.common import open_config
from trainers.data.latents import open_latents
from trainers.distilled import Distilled, Observed
from trainers.evaluate import fidelity_loss, generate, judge_scores
from trainers.recovery import Position, examples_of, recover
from trainers.schedule import Schedule
from trainers.students.plan import Plan


class Mark(NamedTuple):
    """A student somewhere on its way."""

    steps: int
    cpu: float
    """Seconds of training and scoring so far."""
    fidelity: float


def open_setting(config: Path, per_family: int) -> Setting:
    """The sweep's teacher and latents, on one thread."""
    torch.set_num_threads(1)
    sweep = open_config(config, [])
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    setting = Setting(sweep, latents, per_family)
    assert setting.probe.chunks  # made before any clock runs
    return setting


def judged(setting: Setting, student: nn.Module) -> float:
    """The judge's score; not part of any cost."""
    setting.pipeline.transformer = student.eval()
    steps = setting.sweep.config.judge.steps
    pictures = generate(setting.pipeline, setting.captions, 0, steps, setting.size)
    return judge_scores(pictures, setting.captions, setting.task)["overall"]


def distil(
    setting: Setting,
    student: nn.Module,
    plan: Plan,
    schedule: Schedule,
    seed: int,
    marks: Collection[int],
    reached: Callable[[Mark], None],
) -> None:
    """Recovers a student in place; `reached` is called after so many steps as `marks` says, its
    time not counted."""
    family = setting.family
    distilled, observed = Distilled(family, student, plan), Observed(family, setting.teacher)
    spent, begun = 0.0, time.process_time()

    def report(at: Position, _: float) -> None:
        nonlocal spent, begun
        steps = at.done(schedule) + 1
        if steps in marks:
            loss = fidelity_loss(student, family, setting.probe)
            spent += time.process_time() - begun
            reached(Mark(steps, spent, loss))
            begun = time.process_time()

    examples = examples_of(setting.latents, seed)
    recover(distilled, observed, examples, schedule, report=report)
