"""What all methods of the study share: teacher, data, library and how a student is measured.

Plain torch: the study runs in one process, without Ray.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from search.analyse import Analysis
from search.redundancy import analyse
from search.rules import Ground
from search.sweep import Sweep
from trainers.data.latents import Latents, training_inputs
from trainers.distilled import detached
from trainers.evaluate import (
    FidelityProbe,
    fidelity_loss,
    generate,
    judge_scores,
    make_probe,
    replacement_damages,
)
from trainers.library.train import teacher_states, train_replacements
from trainers.losses import span_loss, velocity_loss
from trainers.optimizer import adamw, rate_at
from trainers.probe import ProbeConfig
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan
from trainers.tasks import TASKS

GROUP = 24
"""Replacements trained in one pass of the teacher."""
TIMED = 20
"""Forward passes whose median is a student's latency."""


class Setting:
    """One teacher and its data."""

    def __init__(self, sweep: Sweep, latents: Latents, per_family: int) -> None:
        self.sweep = sweep
        self.latents = latents
        self.family: Family = self.sweep.teacher.family
        self.config: Config = self.sweep.teacher.config
        self.teacher = self.sweep.teacher.transformer()
        self.task = TASKS["shapes"]
        self.captions = self.task.held_out_captions(per_family, 0)
        self.size = self.sweep.config.data.resolution

    @cached_property
    def probe(self) -> FidelityProbe:
        return make_probe(self.teacher, self.family, self.latents, ProbeConfig(), 0)

    @cached_property
    def pipeline(self) -> Any:
        return self.sweep.teacher.pipeline()

    def analysis(self, seed: int) -> Analysis:
        """The teacher as measured on the calibration pictures of a seed."""
        config = self.sweep.config.analyse
        return analyse(self.teacher, self.family, self.latents, self.sweep.analysed, config, seed)

    def ground(self, analysis: Analysis) -> Ground:
        return Ground(self.family.name, self.config, analysis)

    def measure(self, student: nn.Module) -> dict[str, Any]:
        """Everything that is said of a student apart from what it cost."""
        self.pipeline.transformer = student.eval()
        steps = self.sweep.config.judge.steps
        pictures = generate(self.pipeline, self.captions, 0, steps, self.size)
        return {
            "fidelity": fidelity_loss(student, self.family, self.probe),
            "diffusion": self.diffusion(student),
            "judge": judge_scores(pictures, self.captions, self.task),
            "latency_ms": self.latency(student),
        }

    @torch.no_grad()
    def diffusion(self, student: nn.Module) -> float:
        """The data's own loss on the probe: what the path's velocity is, noise − clean, follows
        from a noisy point, its time and the clean latents."""
        losses = []
        pictures = len(self.probe.chunks[0].inputs.noisy_BNC)  # all of them in every chunk
        clean_BNC = self.latents.batch(self.latents.held_out[:pictures]).clean_BNC
        for chunk in self.probe.chunks:
            inputs = chunk.inputs
            t_B11 = inputs.timestep_B.view(-1, 1, 1)
            target_BNC = (inputs.noisy_BNC - clean_BNC) / t_B11
            losses.append(float(velocity_loss(self.family.forward(student, inputs), target_BNC)))
        return statistics.mean(losses)

    @torch.no_grad()
    def latency(self, student: nn.Module) -> float:
        """Median milliseconds of one forward pass of one picture."""
        batch = self.latents.batch(self.latents.held_out[:1])
        from trainers.data.latents import make_inputs

        inputs = make_inputs(batch, torch.tensor([0.5]), torch.zeros_like(batch.clean_BNC))
        times = []
        for _ in range(TIMED):
            started = time.perf_counter()
            self.family.forward(student, inputs)
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)


@dataclass(frozen=True)
class Trained:
    """Replacements trained for one seed."""

    weights: Mapping[BlockPlan, Mapping[str, Tensor]]
    damages: Mapping[BlockPlan, float]
    seconds: Mapping[BlockPlan, float]
    """Of training; a replacement's equal share of its group's time."""


def train_library(
    setting: Setting, blocks: Sequence[BlockPlan], seed: int, start: str = "middle"
) -> Trained:
    """The replacements as the sweep trains them, from a seed and a start of their own."""
    config = setting.sweep.config.library.training.model_copy(update={"start": start})
    weights: dict[BlockPlan, Mapping[str, Tensor]] = {}
    damages: dict[BlockPlan, float] = {}
    seconds: dict[BlockPlan, float] = {}
    for at in range(0, len(blocks), GROUP):
        group = blocks[at : at + GROUP]
        started = time.perf_counter()
        trained = train_replacements(
            setting.teacher, setting.family, group, setting.latents, config, seed
        )
        share = (time.perf_counter() - started) / len(group)
        modules = {block: made.module for block, made in trained.items() if made.failed is None}
        found = replacement_damages(setting.teacher, setting.family, modules, setting.probe)
        damages |= found
        weights |= {block: module.state_dict() for block, module in modules.items()}
        seconds |= dict.fromkeys(group, share)
    return Trained(weights, damages, seconds)


def train_in_sequence(setting: Setting, student: nn.Module, plan: Plan, seed: int) -> None:
    """Trains the replacements of a student one behind the other: each sees what the student's own
    blocks before it make, and aims at the teacher's state after its span. As long as the library's
    training, and with its loss."""
    family, config = setting.family, setting.sweep.config.library.training
    teacher_blocks = setting.sweep.teacher_blocks
    blocks = family.block_modules(student)
    replaced = [i for i, block in enumerate(plan.blocks) if not block.untouched]
    student.requires_grad_(False).train()
    for i in replaced:
        blocks[i].requires_grad_(True)
    optimizer = adamw((p for p in student.parameters() if p.requires_grad), config.lr)
    edges = {plan.blocks[i].span[1] + 1 for i in replaced}
    batches = islice(setting.latents.batches(seed, config.batch_size), config.steps)
    for step, batch in enumerate(batches):
        inputs, _ = training_inputs(batch, seed, config.timestep_shift)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate_at(step, config.steps, config.warmup)
        states = teacher_states(setting.teacher, family, inputs, edges).states
        state, context = family.begin(student, inputs)
        for block, module in zip(plan.blocks, blocks, strict=True):
            state = family.run_block(module, detached(state), context)
            after = block.span[1] + 1
            if not block.untouched:
                text = after < teacher_blocks
                span_loss(
                    state, states[after], inputs.mask_BM, config.magnitude, text=text
                ).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    student.eval()
