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


def generate(
    pipeline: Any,
    captions: Sequence[str],
    seed: int,
    steps: int,
    size: int,
) -> list[Image]:
    """One `size` × `size` picture a caption. Each picture has a generator of its own, so the same
    seed gives teacher and student the same noise, whatever else is drawn beside it."""
    from trainers.data.single_frame import for_single_frames
    from trainers.students.families.flux import text_tokens

    for_single_frames(pipeline.vae)
    # FLUX pads captions, and its default length is not that of every model.
    padded = {"max_sequence_length": text_tokens(pipeline)} if _pads(pipeline) else {}
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image] = []
    batch_size = max(1, min(32, PIXELS_AT_ONCE // size**2))
    for start in range(0, len(captions), batch_size):
        some = list(captions[start : start + batch_size])
        generators = [
            Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(some))
        ]
        drawn = pipeline(
            prompt=some,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=generators,
            **padded,
        )
        pictures += drawn.images
    return pictures


def judge_scores(
    pictures: Sequence[Image], captions: Sequence[str], task: Task
) -> dict[str, float]:
    """The share of right pictures by family, and `overall`, the plain mean of the families."""
    verdicts: dict[str, list[bool]] = {}
    for picture, caption in zip(pictures, captions, strict=True):
        verdicts.setdefault(task.family(caption), []).append(task.judge(picture, caption))
    scores = {
        family: sum(verdicts[family]) / len(verdicts[family])
        for family in task.families
        if family in verdicts
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
