"""The fixed held-out batches on which every student's fidelity is measured.

The teacher's velocity on them is worked out once and stored: every later process reads it, the
processes of one machine from the same mapped file.

Importing this needs no torch, so that a configuration can hold a `ProbeConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, PositiveInt

from storage import layout
from storage.digest import digest_json
from storage.errors import DamagedError, MissingKey
from storage.manifest import publish, published
from storage.section import Section
from storage.store import Store
from trainers.cache import local_copy
from trainers.data.sources import DataError
from trainers.students.families.base import Inputs, Runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainers.data.latents import Latents
    from trainers.teacher import Teacher

TENSORS = "probe.safetensors"
_PARTS = ("noisy_BNC", "timestep_B", "embeds_BMD", "mask_BM", "pooled_BP")


class ProbeConfig(Section):
    """On what the fidelity loss is measured."""

    pictures: PositiveInt = 24
    """Held-out pictures; all of them when fewer are held out."""

    timesteps: PositiveInt = 4
    """Every picture is seen at each of so many times, spread evenly from data to noise."""

    batch_size: PositiveInt = 64
    """Pictures in one pass of a model, at most; of large ones fewer."""


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
    teacher: nn.Module, family: Runs, latents: Latents, config: ProbeConfig, seed: int
) -> FidelityProbe:
    """The probe, on the teacher's device and in its dtype; one pass of the teacher over it all.

    The same pictures, times and noise for the same seed. Raises DataError when nothing is held out.
    """
    import torch

    from trainers.data.latents import generator_at, make_inputs
    from trainers.flow import grid_timesteps
    from trainers.passes import passes

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
            for part in (inputs.rows(rows) for rows in passes(inputs)):
                with torch.no_grad():
                    chunks.append(ProbeChunk(part, family.forward(teacher, part)))
    return FidelityProbe(tuple(chunks))


def shared_probe(
    store: Store,
    teacher: Teacher,
    model: nn.Module,
    latents: Latents,
    encoding: str,
    config: ProbeConfig,
    seed: int,
    *,
    runs: Runs | None = None,
    agreed: Callable[[bool], bool] = lambda found: found,
    save: bool = True,
) -> FidelityProbe:
    """What `make_probe` gives for a teacher on the latents of an encoding; made by the process that
    needs it first.

    `model` is the teacher's transformer, which `runs` runs, its family when None; the probe is on
    its device and in its dtype. Of several ranks that run one model together all call this:
    `agreed` says whether something is so on all of them, and one of them is to `save`.
    """
    example = next(model.parameters())
    made_from: JsonValue = {
        "teacher": teacher.digest,
        "encoding": encoding,
        "probe": config.model_dump(mode="json"),
        "seed": seed,
        "dtype": str(example.dtype),
    }
    prefix = layout.probe(digest_json(made_from))
    try:
        probe = _load(store, prefix, example.device)
    except (MissingKey, DamagedError):  # not there, or another process is just writing it
        probe = None
    if agreed(probe is not None):
        assert probe is not None
        return probe
    probe = make_probe(model, runs or teacher.family, latents, config, seed)
    if save:
        _save(store, prefix, probe)
    return probe


def _save(store: Store, prefix: str, probe: FidelityProbe) -> None:
    from storage.tensors import save_tensors

    tensors: dict[str, Tensor] = {}
    for number, chunk in enumerate(probe.chunks):
        tensors[f"{number}.velocity_BNC"] = chunk.velocity_BNC
        for part in _PARTS:
            tensor = getattr(chunk.inputs, part)
            if tensor is not None:
                tensors[f"{number}.{part}"] = tensor
    grids: list[JsonValue] = [list(chunk.inputs.grid) for chunk in probe.chunks]
    publish(store, prefix, {TENSORS: save_tensors(tensors)}, {"grids": grids})


def _load(store: Store, prefix: str, device: torch.device) -> FidelityProbe:
    from storage.tensors import load_tensors

    manifest = published(store, prefix)
    if manifest is None:
        raise MissingKey(f"{store.url}/{prefix}: no probe")
    folder = local_copy(store, prefix, manifest)
    tensors = load_tensors(folder / TENSORS, f"{store.url}/{prefix}/{TENSORS}")
    grids: Any = manifest.meta["grids"]
    chunks = []
    for number, grid in enumerate(grids):
        parts = {part: tensors.get(f"{number}.{part}") for part in _PARTS}
        placed: Any = {k: None if t is None else t.to(device) for k, t in parts.items()}
        inputs = Inputs(**placed, grid=tuple(grid))
        chunks.append(ProbeChunk(inputs, tensors[f"{number}.velocity_BNC"].to(device)))
    return FidelityProbe(tuple(chunks))
