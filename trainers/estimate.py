"""What training takes, from formulas: memory of each GPU and time of each step. Nothing is built.

Memory counts tensors: what CUDA and its allocator take for themselves comes on top, so a tenth of a
GPU stays free. Tests hold the formulas against real tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainers.schedule import Phase, Schedule, StepConfig
from trainers.students.counts import plan_parameters
from trainers.students.families import family_named
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan, identity_plan


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    gib: float
    """Memory that the driver offers."""
    tflops: float
    """Dense bfloat16 matrix products, as the maker says."""


GPUS: Mapping[str, Gpu] = {
    "A100-40GB": Gpu(39.5, 312),
    "A100-80GB": Gpu(79.3, 312),
    "L40S-48GB": Gpu(44.5, 362),
    "H100-80GB": Gpu(79.1, 989),
    "H200-141GB": Gpu(139.8, 989),
    "B200-180GB": Gpu(178.4, 2250),
}

USED = 0.9
"""Part of a GPU that tensors may take."""

MFU = 0.4
"""Share of those products that training is assumed to reach."""

# Bytes a token and channel of width: of a span's loss, of gradients on their way through a block,
# of a block that runs without a graph, and of a state.
_SPAN_LOSS = 28
_BACKWARD = 12
_PASSING = 29
_STATE = 2
_ADAMW, _ADAMW_8BIT = 8.0, 2 + 8 / 256


@dataclass(frozen=True)
class Pictures:
    """What one picture is to the transformer."""

    image_tokens: int
    text_tokens: int

    @classmethod
    def of(cls, resolution: int, text_tokens: int) -> Pictures:
        """Autoencoders reduce a side to an eighth, and a token is two by two of that."""
        return cls((resolution // 16) ** 2, text_tokens)


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase of a schedule, on each GPU."""

    phase: Phase
    memory: Mapping[str, int]
    """Bytes at the fullest moment, by what takes them."""
    flops: float
    """Of a step, all GPUs together; recomputed ones are among them."""
    seconds: float
    """Of all its steps."""

    @property
    def total(self) -> int:
        """Bytes of each GPU."""
        return sum(self.memory.values())

    @property
    def checkpoint(self) -> int:
        """Bytes of each GPU's part of a checkpoint."""
        return sum(self.memory[part] for part in ("weights", "average", "moments"))


@dataclass(frozen=True)
class Run:
    """What is to be trained, on what."""

    config: Config
    """The teacher's transformer config."""
    plan: Plan
    step: StepConfig
    pictures: Pictures
    workers: int
    """GPUs."""
    shard_teacher: bool
    tflops: float
    """Of each GPU, as the maker says."""
    mfu: float = MFU

    @property
    def family(self) -> Family:
        return family_named(self.plan.family)


def estimate(run: Run, schedule: Schedule) -> tuple[PhaseEstimate, ...]:
    """What each phase takes."""
    return tuple(_phase(run, phase) for phase in schedule.phases)


def _phase(run: Run, phase: Phase) -> PhaseEstimate:
    flops = step_flops(run, phase)
    rate = run.workers * run.tflops * 1e12 * run.mfu
    memory = {**held_memory(run, phase), "activations": activations(run, phase)}
    return PhaseEstimate(phase, memory, flops, phase.steps * flops / rate)


def held_memory(run: Run, phase: Phase) -> dict[str, int]:
    """Bytes that a GPU holds whatever the pictures are."""
    family, config, plan, gpus = run.family, run.config, run.plan, run.workers
    student = plan_parameters(plan, config)
    whole = identity_plan(plan.family, plan.teacher_blocks)
    teacher = plan_parameters(whole, config)
    sizes = [family.block_parameters(config, block) for block in plan.blocks]
    trained = student
    if phase.train == "replacements":
        replaced = zip(sizes, plan.blocks, strict=True)
        trained = sum(size for size, block in replaced if not block.untouched)
    moments = _ADAMW if run.step.optimizer == "adamw" else _ADAMW_8BIT
    outside = family.outside_parameters(config)
    # A block at work, the next one on its way, and the gradient of the last being reduced.
    gathered = 2 * (outside + 2 * max(sizes)) + (2 + 4) * max(sizes)
    if run.shard_teacher:
        blocks = [family.block_parameters(config, block) for block in whole.blocks]
        gathered += 2 * (outside + 2 * max(blocks))
    return {
        "weights": 4 * student // gpus,
        "average": 4 * student // gpus if run.step.average is not None else 0,
        "gradients": 4 * trained // gpus,
        "moments": int(moments * trained) // gpus,
        "teacher": 2 * teacher // (gpus if run.shard_teacher else 1),
        "gathered": gathered,
    }


def activations(run: Run, phase: Phase) -> int:
    """Bytes of states and graphs on a GPU at the fullest moment."""
    family, pictures = run.family, run.pictures
    share = math.ceil(phase.batch_size / run.workers)
    part = min(run.step.micro_batch or share, share)
    channels = (pictures.image_tokens + pictures.text_tokens) * family.width(run.config)
    entering = channels + pictures.text_tokens * family.width(run.config)  # text also modulated
    kept = {block: _kept(family, run.config, block, pictures) for block in run.plan.blocks}
    if phase.loss == "span":
        most = max(kept[block] for block in run.plan.blocks if not block.untouched)
        walking = 2 * _STATE * entering * share
        return max(_PASSING * channels * share, walking + part * (most + _SPAN_LOSS * channels))
    if run.step.checkpointing:
        entered = len(run.plan.blocks) * _STATE * entering
        return part * (entered + max(kept.values()) + _BACKWARD * channels)
    return part * (sum(kept[block] for block in run.plan.blocks) + _BACKWARD * channels)


def library_memory(
    family: Family,
    config: Config,
    group: Sequence[BlockPlan],
    batch_size: int,
    micro_batch: int | None,
    pictures: Pictures,
) -> dict[str, int]:
    """Bytes of a GPU whose worker trains a group of replacements together, at the fullest moment,
    by what takes them. The teacher is whole, and reads at most `micro_batch` pictures at a time."""
    blocks = family.blocks(config)
    trained = [family.block_parameters(config, block) for block in group]
    edges = {edge for block in group for edge in (block.span[0], block.span[1] + 1)}
    width, part = family.width(config), min(micro_batch or batch_size, batch_size)
    channels = (pictures.image_tokens + pictures.text_tokens) * width
    entering = channels + pictures.text_tokens * width  # text also modulated
    graph = max(_kept(family, config, block, pictures) for block in group)
    # Of linear maps, what they read and should add.
    mapped = sum((block.ffn == "linear") * channels for block in group)
    mapped += sum((block.text == "projected") * pictures.text_tokens * width for block in group)
    return {
        "teacher": 2 * plan_parameters(identity_plan(family.name, blocks), config),
        "weights": 4 * sum(trained),
        "gradients": 4 * sum(trained),
        "moments": int(_ADAMW * sum(trained)),
        "states": _STATE * (len(edges) * entering + 2 * mapped) * batch_size,
        # Weights in half precision beside a replacement's graph, or a pass of the teacher.
        "activations": max(
            2 * max(trained) + part * (graph + _SPAN_LOSS * channels),
            passing_memory(family, config, part, pictures),
        ),
    }


def passing_memory(family: Family, config: Config, count: int, pictures: Pictures) -> int:
    """Bytes of a pass of `count` pictures without a graph, beside the weights, at its fullest."""
    tokens = pictures.image_tokens + pictures.text_tokens
    return _PASSING * count * tokens * family.width(config)


def library_flops(
    family: Family, config: Config, group: Sequence[BlockPlan], pictures: Pictures
) -> float:
    """Floating-point operations for each picture of a step of such a group."""
    last = max(block.span[1] for block in group)
    whole = identity_plan(family.name, family.blocks(config)).blocks[: last + 1]
    passed = sum(block_flops(family, config, block, pictures) for block in whole)
    return passed + 3 * sum(block_flops(family, config, block, pictures) for block in group)


def step_flops(run: Run, phase: Phase) -> float:
    """Floating-point operations of a step, on average; a backward pass takes two forward ones."""
    whole = identity_plan(run.plan.family, run.plan.teacher_blocks).blocks
    own = phase.loss != "span" or phase.inputs == "student"
    flops = 0.0
    for block in run.plan.blocks:
        forward = block_flops(run.family, run.config, block, run.pictures)
        trained = phase.train == "all" or not block.untouched
        if phase.loss != "span":
            # Gradients also pass through blocks that are not trained, without their weights'.
            flops += forward * ((3 if trained else 2) + run.step.checkpointing)
        elif trained or own:
            flops += forward * (3 if trained else 1)
    if phase.loss != "diffusion":
        passes = sum(block_flops(run.family, run.config, b, run.pictures) for b in whole)
        flops += passes / phase.reuse
    return flops * phase.batch_size


def block_flops(family: Family, config: Config, block: BlockPlan, pictures: Pictures) -> float:
    """Of one block's forward pass over one picture; two for each multiplication and its addition.

    Modulation, which is once a picture and not a token, is left out.
    """
    work = family.block_work(config, block)
    image, text = pictures.image_tokens, pictures.text_tokens
    products = work.image_weights * image + work.text_weights * text
    return 2.0 * products + 4.0 * (image + text) ** 2 * family.width(config)


def _kept(family: Family, config: Config, block: BlockPlan, pictures: Pictures) -> int:
    """Bytes that autograd keeps of a block for one picture."""
    work = family.block_work(config, block)
    return work.image_kept * pictures.image_tokens + work.text_kept * pictures.text_tokens
