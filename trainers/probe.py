"""The fixed held-out batches on which every student's fidelity is measured.

Importing this needs no torch, so that a configuration can hold a `ProbeConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from storage.section import Section
from trainers.data.sources import DataError
from trainers.students.families.base import Family, Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainers.data.latents import Latents


class ProbeConfig(Section):
    """On what the fidelity loss is measured."""

    pictures: PositiveInt = 24
    """Held-out pictures; all of them when fewer are held out."""

    timesteps: PositiveInt = 4
    """Every picture is seen at each of so many times, spread evenly from data to noise."""

    batch_size: PositiveInt = 64
    """Pictures in one pass of a model."""


@dataclass(frozen=True)
class ProbeChunk:
    """One pass's worth of the probe."""

    inputs: Inputs
    velocity_BNC: Tensor
    """The teacher's."""


@dataclass(frozen=True)
class FidelityProbe:
    """Held-out latents over a fixed grid of timesteps, and the teacher's velocity on them."""

    chunks: tuple[ProbeChunk, ...]


def make_probe(
    teacher: nn.Module, family: Family, latents: Latents, config: ProbeConfig, seed: int
) -> FidelityProbe:
    """The probe, on the teacher's device and in its dtype; one pass of the teacher over it all.

    The same pictures, times and noise for the same seed. Raises DataError when nothing is held out.
    """
    import torch

    from trainers.data.latents import generator_at, make_inputs
    from trainers.flow import grid_timesteps

    if not latents.held_out:
        raise DataError("data.held_out: 0 pictures are held out; fidelity needs at least one")
    example = next(teacher.parameters())
    chunks = []
    chosen = latents.held_out[: config.pictures]
    for place, t in enumerate(grid_timesteps(config.timesteps).tolist()):
        for start in range(0, len(chosen), config.batch_size):
            batch = latents.batch(chosen[start : start + config.batch_size])
            generator = generator_at(seed, place * len(chosen) + start, "fidelity")
            noise_BNC = torch.randn(batch.clean_BNC.shape, generator=generator)
            batch = batch.to(example.device, example.dtype)
            inputs = make_inputs(batch, torch.full((len(batch),), t), noise_BNC.to(batch.clean_BNC))
            with torch.no_grad():
                chunks.append(ProbeChunk(inputs, family.forward(teacher, inputs)))
    return FidelityProbe(tuple(chunks))
