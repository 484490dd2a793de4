"""How good a student is: its velocity against the teacher's, and its pictures before a judge.

Shapes: B batch, N image tokens, C latent channels of a packed token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from trainers.losses import velocity_loss
from trainers.probe import FidelityProbe, ProbeChunk, ProbeConfig, make_probe
from trainers.students.families.base import Family, Runs
from trainers.students.plan import BlockPlan
from trainers.tasks import Task

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = [
    "FidelityProbe",
    "ProbeConfig",
    "batches",
    "family_scores",
    "fidelity_loss",
    "generate",
    "judge_scores",
    "make_probe",
    "replacement_damages",
]


PIXELS_AT_ONCE = 4 * 2**20
"""Of pictures drawn together: what decodes those of Qwen-Image takes 13 GiB."""


@torch.no_grad()
def fidelity_loss(model: nn.Module, family: Runs, probe: FidelityProbe) -> float:
    """Mean squared difference of the model's and the teacher's velocity over the probe.

    NaN when the model's velocity is; the caller decides what that means.
    """
    with _evaluating(model):
        return _mean(
            (velocity_loss(family.forward(model, chunk.inputs), chunk.velocity_BNC), chunk)
            for chunk in probe.chunks
        )


@torch.no_grad()
def replacement_damages(
    teacher: nn.Module,
    family: Family,
    replacements: Mapping[BlockPlan, nn.Module],
    probe: FidelityProbe,
) -> dict[BlockPlan, float]:
    """The fidelity loss of the teacher with one replacement in it, for each replacement.

    One teacher pass over the probe serves all; each replacement then runs only itself and the
    blocks behind its span.
    """
    blocks = family.block_modules(teacher)
    starts = {block.span[0] for block in replacements}
    errors: dict[BlockPlan, list[tuple[Tensor, ProbeChunk]]] = {b: [] for b in replacements}
    for chunk in probe.chunks:
        state, context = family.begin(teacher, chunk.inputs)
        states = {}
        for index, module in enumerate(blocks):
            if index in starts:
                states[index] = state
            state = family.run_block(module, state, context)
        for block, replacement in replacements.items():
            with _evaluating(replacement):
                state = family.run_block(replacement, states[block.span[0]], context)
            for module in blocks[block.span[1] + 1 :]:
                state = family.run_block(module, state, context)
            velocity_BNC = family.end(teacher, state, context)
            errors[block].append((velocity_loss(velocity_BNC, chunk.velocity_BNC), chunk))
    return {block: _mean(iter(measured)) for block, measured in errors.items()}


def batches(count: int, size: int) -> list[range]:
    """Which of `count` pictures of `size` × `size` pixels are drawn together, by number."""
    most = max(1, min(32, PIXELS_AT_ONCE // size**2))
    return [range(start, min(start + most, count)) for start in range(0, count, most)]


def generate(
    pipeline: Any,
    captions: Sequence[str],
    seed: int,
    steps: int,
    size: int,
    first: int = 0,
) -> list[Image]:
    """One `size` × `size` picture a caption. Each picture has a generator of its own, so the same
    seed gives teacher and student the same noise, whatever else is drawn beside it; it goes by the
    caption's number, which is `first` for the first of these."""
    from trainers.data.single_frame import for_single_frames
    from trainers.students.families.flux import text_tokens

    for_single_frames(pipeline.vae)
    # FLUX pads captions, and its default length is not that of every model.
    padded = {"max_sequence_length": text_tokens(pipeline)} if _pads(pipeline) else {}
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image] = []
    for batch in batches(len(captions), size):
        drawn = pipeline(
            prompt=[captions[i] for i in batch],
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=[Generator().manual_seed(seed * 1_000_003 + first + i) for i in batch],
            **padded,
        )
        pictures += drawn.images
    return pictures


def judge_scores(
    pictures: Sequence[Image], captions: Sequence[str], task: Task
) -> dict[str, float]:
    """`family_scores` of pictures that are still to be judged."""
    verdicts = [task.judge(p, c) for p, c in zip(pictures, captions, strict=True)]
    return family_scores(verdicts, captions, task)


def family_scores(
    verdicts: Sequence[bool], captions: Sequence[str], task: Task
) -> dict[str, float]:
    """The share of right pictures by family, and `overall`, the plain mean of the families."""
    by_family: dict[str, list[bool]] = {}
    for verdict, caption in zip(verdicts, captions, strict=True):
        by_family.setdefault(task.family(caption), []).append(verdict)
    scores = {
        family: sum(by_family[family]) / len(by_family[family])
        for family in task.families
        if family in by_family
    }
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def _pads(pipeline: Any) -> bool:
    return getattr(pipeline, "tokenizer_2", None) is not None


def _mean(measured: Iterator[tuple[Tensor, ProbeChunk]]) -> float:
    """Of per-chunk means, weighted by the chunks' sizes."""
    total, count = 0.0, 0
    for value, chunk in measured:
        rows = len(chunk.velocity_BNC)
        total, count = total + float(value) * rows, count + rows
    return total / count


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and its like are off inside; the mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
