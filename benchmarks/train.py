"""Training: memory of span phases by depth, steps a second under Ray Train, and speed on a GPU.

    python -m benchmarks.train                # all three parts
    python -m benchmarks.train --only gpu     # needs no Ray and no store's client

The second needs torch, diffusers, accelerate, pydantic, PyYAML, xxhash and filelock alone.

Weights and data are random. Prints one JSON object a row; the GPU's rows need a CUDA GPU. One of
them that fails says with what, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from benchmarks.memory import PeakMemory
from trainers.distilled import Distilled, Observed, compile_blocks
from trainers.estimate import GPUS, Gpu, Pictures, Run, block_flops, estimate, step_flops
from trainers.optimizer import make_optimizer
from trainers.recovery import Example, backward, set_trainable, train_step
from trainers.schedule import PLAIN, Phase, Schedule, StepConfig
from trainers.sharded import shard
from trainers.students.families import family_named
from trainers.students.families.base import Config, Inputs
from trainers.students.families.qwen_image import QWEN_IMAGE
from trainers.students.plan import BlockPlan, Plan, identity_plan, load_plan

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
SMALL: Config = {
    **QWEN_IMAGE,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": [8, 12, 12],
    "num_layers": 12,
}
"""Blocks of 0.6M parameters, for a CPU."""
Row = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=["memory", "ray", "gpu"])
    arguments.add_argument("--turns", type=int, default=15, help="of Ray Train, and of torchrun")
    arguments.add_argument("--seconds", type=float, default=10.0, help="a turn's length")
    options = arguments.parse_args()
    rows: list[Iterator[Row]] = []
    if options.only in (None, "memory"):
        rows.append(memory_rows(SMALL, (12, 24, 48)))
    if options.only in (None, "ray"):
        from benchmarks.raytrain import Job, ray_row

        jobs = (Job(2, one_core=False), Job(2, one_core=True), Job(1, one_core=False))
        rows.append(ray_row(job, options.turns, options.seconds) for job in jobs)
    if options.only in (None, "gpu"):
        rows.append(gpu_rows())
    failed = False
    for row in itertools.chain(*rows):
        print(json.dumps(row), flush=True)
        failed |= "failed" in row
    if failed:
        raise SystemExit(1)


def memory_rows(config: Config, depths: Sequence[int], side: int = 16) -> Iterator[Row]:
    """The most that a backward pass holds beside weights and gradients, by the teacher's blocks."""
    for blocks in depths:
        deep = {**config, "num_layers": blocks}
        plan = halved(blocks)
        row: Row = {"part": "memory", "blocks": blocks}
        for phase in phases(batch=4):
            student, teacher = built(deep, plan, PLAIN)
            set_trainable(student, phase)
            example = drawn(config, Pictures(side * side, 32), phase.batch_size)
            backward(student, teacher, example, phase, lambda value: value)
            with PeakMemory() as memory:
                backward(student, teacher, example, phase, lambda value: value)
            row[f"{phase.loss}_mib"] = round(memory.peak / 2**20, 1)
        yield row


def gpu_rows() -> Iterator[Row]:
    """Qwen-Image's own block sizes on the GPU of this machine."""
    if not torch.cuda.is_available():
        yield {"part": "gpu", "skipped": "no CUDA GPU here"}
        return
    name = torch.cuda.get_device_name()
    gpu = next((gpu for kind, gpu in GPUS.items() if kind.split("-")[0] in name), None)
    device, pictures = torch.device("cuda"), Pictures.of(1024, 256)
    offered = torch.cuda.get_device_properties(device).total_memory
    for loss, compiled in itertools.product(("span", "velocity"), (False, True)):
        step = StepConfig(micro_batch=1, checkpointing=loss == "velocity", compile=compiled)
        phase = next(phase for phase in phases(batch=4) if phase.loss == loss)
        blocks = fitting(QWEN_IMAGE, phase, step, pictures, int(0.85 * offered))
        row: Row = {"gpu": name, "part": "gpu", "phase": loss, "compiled": compiled}
        row["teacher_blocks"] = blocks
        measure = partial(step_row, QWEN_IMAGE, blocks, phase, step, pictures, device, gpu)
        yield attempted(row, measure, device)
    yield from latency_rows(shapes(), (1024, 1328), device)


def attempted(row: Row, measure: Callable[[], Row], device: torch.device) -> Row:
    """The row with what is measured, or with why nothing was: what is left to measure may be
    smaller, or need no compiler. Nothing of it stays in memory, where the next one has to fit."""
    try:
        row = row | measure()
    except Exception as error:
        # In words alone: the error itself holds on to all that was there when it was raised.
        row = row | {"failed": f"{type(error).__name__}: {error}"}
    # Sharded models hold themselves in circles.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def fitting(config: Config, phase: Phase, step: StepConfig, pictures: Pictures, most: int) -> int:
    """The largest even number of teacher blocks whose training fits in `most` bytes on one GPU."""
    blocks = 2
    while blocks < int(config["num_layers"]):
        more = blocks + 2
        run = Run({**config, "num_layers": more}, halved(more), step, pictures, 1, True, 1.0)
        if estimate(run, Schedule(phases=(phase,)))[0].total > most:
            break
        blocks = more
    return blocks


def step_row(
    config: Config,
    blocks: int,
    phase: Phase,
    step: StepConfig,
    pictures: Pictures,
    device: torch.device,
    gpu: Gpu | None,
    repeats: int = 5,
) -> Row:
    """One phase on one device: time and memory of a step, and what it makes of the device."""
    config, plan = {**config, "num_layers": blocks}, halved(blocks)
    with alone(device):
        seconds, peak = step_cost(config, plan, phase, step, pictures, device, repeats)
    # What a model needs: what checkpointing computes again is not useful work.
    run = Run(config, plan, PLAIN, pictures, 1, True, 1.0)
    rate = step_flops(run, phase) / seconds
    tokens = phase.batch_size * (pictures.image_tokens + pictures.text_tokens)
    expected = Run(config, plan, step, pictures, 1, True, 1.0)
    return {
        "teacher_blocks": blocks,
        "student_blocks": len(plan.blocks),
        "batch": phase.batch_size,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(rate / 1e12, 1),
        "mfu": round(rate / (gpu.tflops * 1e12), 3) if gpu else None,
        "peak_gib": round(peak / 2**30, 2),
        "expected_gib": round(estimate(expected, Schedule(phases=(phase,)))[0].total / 2**30, 2),
    }


def step_cost(
    config: Config,
    plan: Plan,
    phase: Phase,
    step: StepConfig,
    pictures: Pictures,
    device: torch.device,
    repeats: int,
) -> tuple[float, int]:
    """Seconds of a training step, and the most bytes held."""
    student, teacher = built(config, plan, step, device)
    set_trainable(student, phase)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained, 1e-6)
    example = drawn(config, pictures, phase.batch_size, device, torch.bfloat16)

    def once() -> None:
        train_step(student, teacher, example, phase, optimizer, lambda value: value)

    return measured(once, device, repeats)


def latency_rows(
    models: dict[str, tuple[Config, Plan]],
    resolutions: Sequence[int],
    device: torch.device,
    text_tokens: int = 256,
) -> Iterator[Row]:
    """One forward pass over one picture, of every model at every resolution."""
    for (name, (config, plan)), resolution in itertools.product(models.items(), resolutions):
        row = {"part": "latency", "model": name, "resolution": resolution}
        pictures = Pictures.of(resolution, text_tokens)
        yield attempted(row, partial(latency_row, config, plan, pictures, device), device)


def latency_row(config: Config, plan: Plan, pictures: Pictures, device: torch.device) -> Row:
    """One forward pass over one picture."""
    family = family_named(plan.family)
    model = family.build(config, plan, "meta", torch.bfloat16).to_empty(device=device)
    initialise(model.requires_grad_(False))
    inputs = drawn(config, pictures, 1, device, torch.bfloat16).inputs

    @torch.no_grad()
    def once() -> None:
        family.forward(model, inputs)

    seconds, peak = measured(once, device, repeats=5)
    flops = sum(block_flops(family, config, block, pictures) for block in plan.blocks)
    return {
        "ms": round(1000 * seconds, 1),
        "tflops": round(flops / seconds / 1e12, 1),
        "peak_gib": round(peak / 2**30, 2),
    }


def shapes() -> dict[str, tuple[Config, Plan]]:
    """The teacher and the papers' students, with the config of the teacher each is cut from."""
    plans = {
        "teacher": identity_plan("qwen_image", 60),
        "PPCL-10B": load_plan(RECIPES / "ppcl-qwen-image-10b.yaml"),
        # Which blocks it keeps, a search finds; whichever they are, it is as fast.
        "Amber-10B": halved(60),
        "Amber-6B": load_plan(RECIPES / "amber-qwen-image-6b.yaml"),
    }
    return {
        name: ({**QWEN_IMAGE, "num_layers": plan.teacher_blocks}, plan)
        for name, plan in plans.items()
    }


def phases(batch: int) -> tuple[Phase, Phase]:
    """A span phase, and one through the whole student."""
    return (
        Phase(loss="span", steps=1, lr=1e-5, batch_size=batch),
        Phase(loss="velocity", train="all", steps=1, lr=1e-5, batch_size=batch),
    )


def halved(blocks: int) -> Plan:
    """The student that merges every two blocks."""
    pairs = tuple(BlockPlan(span=(i, i + 1)) for i in range(0, blocks, 2))
    return Plan(family="qwen_image", teacher_blocks=blocks, blocks=pairs)


def built(
    config: Config, plan: Plan, step: StepConfig, device: torch.device | None = None
) -> tuple[Distilled, Observed]:
    """Student and teacher with random weights: on a `device` sharded, in bfloat16 with float32
    weights of the student's, else in float32 on the CPU."""
    family, place = family_named(plan.family), device or torch.device("cpu")
    half = torch.bfloat16 if device else torch.float32
    whole = identity_plan(plan.family, plan.teacher_blocks)
    student = Distilled(family, family.build(config, plan, "meta", torch.float32), plan, step)
    teacher = Observed(family, family.build(config, whole, "meta", half))
    for module in (student, teacher):
        if step.compile:
            compile_blocks(module)
        if device:
            shard(module, place, half)
        module.to_empty(device=place)
        initialise(module)
    return student, teacher


@torch.no_grad()
def initialise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)


def drawn(
    config: Config,
    pictures: Pictures,
    batch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Example:
    """A batch of noise."""
    torch.manual_seed(1)
    side = round(pictures.image_tokens**0.5)
    channels = int(config["in_channels"])
    noisy, clean, noise = torch.randn(3, batch, side * side, channels).to(device, dtype)
    embeds = torch.randn(batch, pictures.text_tokens, int(config["joint_attention_dim"]))
    times = torch.linspace(0.1, 0.9, batch).to(device, dtype)
    inputs = Inputs(noisy, times, embeds.to(device, dtype), None, (side, side))
    return Example(inputs, clean, noise)


def measured(once: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, int]:
    """The median of several runs' seconds after warm ones, and the most bytes held (CUDA alone)."""
    cuda = device.type == "cuda"
    seconds = []
    for run in range(2 + repeats):
        if cuda:
            if run == 2:
                torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        once()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    return statistics.median(seconds[2:]), peak


class alone:  # noqa: N801  # a context manager
    """A process group of this process alone, which sharding needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        torch.distributed.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=torch.distributed.HashStore(),  # type: ignore[attr-defined]  # torch does not list it
            rank=0,
            world_size=1,
        )

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
