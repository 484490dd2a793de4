"""Measures how redundant a teacher's blocks are, on a few training pictures. Plain torch.

Linear probes and their chains follow PPCL (arXiv 2511.16156), importance Amber-Image
(arXiv 2602.17047, without its weighting of timesteps: each band is given apart).

One pass over the pictures sums up what probes, maps and CKA are solved from (search/statistics.py);
a second looks at what changes at single blocks do (search/effects.py). Several `Measurer`s share
the pictures: sums and solutions of a block meet at one of them, so that none holds more than its
own sums and the solutions. Shapes: B batch, T sampled tokens, D width, L blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from search.analyse import AnalyseConfig, Analysis
from search.cka import Kernel, aligned, cka_map, kernel
from search.effects import Effects, changed_blocks, measure, probed, single_blocks
from search.statistics import STREAMS, Statistics, cosine_influence, gather, share
from trainers.data.latents import Latents, generator_at, make_inputs
from trainers.passes import passes
from trainers.progress import Progress, silent
from trainers.students.families.base import Config, Family, Inputs
from trainers.students.fits import solve_maps, trained_probe
from trainers.students.plan import BlockPlan
from trainers.students.surgery import Fits


@dataclass(frozen=True)
class Solved:
    """One block's solutions, of the sums over all pictures."""

    block: int
    probes: Mapping[tuple[int, str], Tensor]
    fits: Fits
    ffn_error: float
    ridged: int


class Measurer:
    """One of several workers that measure one teacher; alone, it does everything (`analyse`).

    In this order: `gather` on all, `take` a block from all and `solve` it on any, `effects` on all,
    `conclude` on any.
    """

    def __init__(
        self,
        teacher: nn.Module,
        family: Family,
        latents: Latents,
        candidates: Sequence[BlockPlan],
        config: AnalyseConfig,
        seed: int,
        part: int = 0,
        parts: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self._teacher, self._family, self._latents = teacher, family, latents
        self._candidates, self._config, self._seed = candidates, config, seed
        self._part, self._parts = part, parts
        self._progress = progress or silent()
        self._settings: Config = dict(cast("Any", teacher).config)
        self._statistics = Statistics()
        self._seen = 0
        """Pictures summed up, and measured."""
        self._advance(0)

    def gather(self) -> None:
        """Sums up this worker's batches, in one pass of the teacher."""
        wanted = wanted_maps(self._family, self._settings, self._candidates)
        tokens = share(self._config.tokens, self._batches)
        for number in range(self._part, self._batches, self._parts):
            inputs, bands_B = self._batch(number)
            gather(
                self._statistics, self._teacher, self._family, inputs, number, wanted, tokens,
                self._seed,
            )  # fmt: skip
            self._advance(len(bands_B))

    def take(self, block: int) -> Statistics:
        """Hands over the sums of one block, which are not kept."""
        return self._statistics.take(block)

    def samples(self) -> Statistics:
        """Hands over the sampled states, which are not kept."""
        return self._statistics.take(None)

    def solve(self, block: int, *sums: Statistics) -> Solved:
        """Probes and maps of one block from all workers' sums."""
        total = Statistics()
        for part in sums:
            total.add(part.to(self._device))
        steps = self._config.probe_steps
        solutions = {key: found.probe() for key, found in total.probes.items()}
        maps = solve_maps(total.maps)
        names = _ffn_maps(self._family, self._settings, block)
        errors = [total.maps[block, name].error() for name in names]
        return Solved(
            block=block,
            probes={
                key: trained_probe(solution.weight, total.probes[key], steps).cpu()
                for key, solution in solutions.items()
            },
            fits={i: _on_cpu(tensors) for i, tensors in maps.fits.items()},
            ffn_error=sum(errors) / len(errors) if errors else math.inf,
            ridged=sum(solution.ridged for solution in solutions.values()) + len(maps.ridged),
        )

    def effects(self, *solved: Solved) -> Effects:
        """What changes at single blocks do to this worker's pictures. It takes most of the time:
        several passes of the teacher for each of its blocks."""
        probes = {key: weight for one in solved for key, weight in one.probes.items()}
        fits = {block: maps for one in solved for block, maps in one.fits.items()}
        effects = Effects.none(len(solved), self._config.bands, changed_blocks(self._candidates))
        for inputs, bands_B in self._passes():
            measure(effects, self._teacher, self._family, inputs, bands_B, probes, fits)
            self._advance(len(bands_B))
        return effects

    def conclude(
        self, solved: Sequence[Solved], effects: Sequence[Effects], samples: Sequence[Statistics]
    ) -> Analysis:
        """The analysis, of what all workers found."""
        config, device = self._config, self._device
        whole = Effects.none(len(solved), config.bands, changed_blocks(self._candidates))
        for part in effects:
            whole.add(part)
        states = Statistics()
        for drawn in samples:
            states.add(drawn)
        probes = {key: weight for one in solved for key, weight in one.probes.items()}
        max_span = max(block.length for block in self._candidates)
        maps, chains, influence = {}, {}, {}
        for name in STREAMS:
            states_TD = [state_TD.to(device) for state_TD in states.samples(name)]
            own = [probes[i, name].to(device) for i in range(len(solved))]
            maps[name] = cka_map(states_TD[1:], config.kernel).cpu()
            chains[name] = _chains(states_TD, own, max_span, config.kernel)
            influence[name] = cosine_influence(states_TD).cpu()
        return Analysis(
            bands=_band_names(config.bands),
            importance=whole.importance(),
            influence=(influence["image"] + influence["text"]) / 2,
            ffn_error=torch.tensor([one.ffn_error for one in solved]),
            image_cka=maps["image"],
            text_cka=maps["text"],
            image_chain=chains["image"],
            text_chain=chains["text"],
            damages=whole.damages(self._candidates),
            ridged=sum(one.ridged for one in solved),
        )

    @property
    def _device(self) -> torch.device:
        return next(self._teacher.parameters()).device

    @property
    def _pictures(self) -> int:
        """That all workers measure on, each as often as there are bands."""
        return self._config.bands * min(self._config.pictures, len(self._latents.training))

    @property
    def _batches(self) -> int:
        """Batches of all workers."""
        return math.ceil(self._pictures / self._config.batch_size)

    def _batch(self, number: int) -> tuple[Inputs, Tensor]:
        """A batch, and the band of each picture in it; band 0 is the noisiest. It does not depend
        on the number of workers."""
        config, example = self._config, next(self._teacher.parameters())
        pictures = self._latents.training[: config.pictures]
        wanted = [(picture, band) for picture in pictures for band in range(config.bands)]
        chosen = wanted[number * config.batch_size : (number + 1) * config.batch_size]
        batch = self._latents.batch([picture for picture, _ in chosen])
        bands_B = torch.tensor([band for _, band in chosen])
        generator = generator_at(self._seed, number * config.batch_size, "analysis")
        noise_BNC = torch.randn(batch.clean_BNC.shape, generator=generator)
        t_B = 1 - (bands_B + torch.rand(len(chosen), generator=generator)) / config.bands
        batch = batch.to(example.device, example.dtype)
        return make_inputs(batch, t_B, noise_BNC.to(batch.clean_BNC)), bands_B

    def _passes(self) -> Iterator[tuple[Inputs, Tensor]]:
        """This worker's share of what passes through the teacher together, of all batches: one
        batch keeps several workers busy when its pictures are large."""
        at = 0
        for number in range(self._batches):
            inputs, bands_B = self._batch(number)
            for rows in passes(inputs):
                if at % self._parts == self._part:
                    yield inputs.rows(rows), bands_B[rows]
                at += 1

    def _advance(self, pictures: int) -> None:
        self._seen += pictures
        self._progress.update(self._seen, 2 * math.ceil(self._pictures / self._parts))


def analyse(
    teacher: nn.Module,
    family: Family,
    latents: Latents,
    candidates: Sequence[BlockPlan],
    config: AnalyseConfig,
    seed: int,
    progress: Progress | None = None,
) -> Analysis:
    """Measure a frozen teacher and estimate the damage of each candidate replacement, here."""
    alone = Measurer(teacher, family, latents, candidates, config, seed, progress=progress)
    alone.gather()
    blocks = range(len(family.block_modules(teacher)))
    solved = [alone.solve(i, alone.take(i)) for i in blocks]
    return alone.conclude(solved, [alone.effects(*solved)], [alone.samples()])


def wanted_maps(
    family: Family, config: Config, candidates: Sequence[BlockPlan]
) -> dict[int, set[str]]:
    """The linear maps that are fitted to each block: those of the candidates, and of all FFNs."""
    wanted = {i: set(_ffn_maps(family, config, i)) for i in range(family.blocks(config))}
    for block in candidates:
        for variant in [] if block.depth_only else single_blocks(block):
            wanted[variant.span[0]].update(family.maps(variant))
    return wanted


def _on_cpu(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in maps.items()}


def _ffn_maps(family: Family, config: Config, i: int) -> tuple[str, ...]:
    """The maps that would stand for the FFNs of a block; none where it cannot have them."""
    linear = BlockPlan(span=(i, i), ffn="linear")
    return () if family.refusal(config, linear) else family.maps(linear)


def _chains(
    samples: Sequence[Tensor], probes: Sequence[Tensor], max_span: int, by: Kernel
) -> Tensor:
    kernels = [kernel(after_TD, by) for after_TD in samples[1:]]
    chain = torch.full((len(probes), max_span), math.nan)
    for u in range(len(probes)):
        state_TD = samples[u + 1]
        chain[u, 0] = 1.0
        for k in range(u + 1, min(u + max_span, len(probes))):
            state_TD = probed(state_TD, probes[k])
            chain[u, k - u] = aligned(kernel(state_TD, by), kernels[k])
    return chain


def _band_names(bands: int) -> tuple[str, ...]:
    edges = [1 - i / bands for i in range(bands + 1)]
    return tuple(f"{low:.2g}–{high:.2g}" for high, low in itertools.pairwise(edges))
