"""Measures how redundant a teacher's blocks are, on a few training pictures. Plain torch.

Linear probes and their chains follow PPCL (arXiv 2511.16156), importance Amber-Image
(arXiv 2602.17047, without its weighting of timesteps: each band is given apart). Shapes: B batch,
N image tokens, M text tokens, D width, T sampled tokens, L blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from search.analyse import AnalyseConfig, Analysis
from search.cka import Kernel, aligned, cka_map, kernel
from search.statistics import STREAMS, Statistics, cosine_influence, gather, share
from trainers.data.latents import Latents, generator_at, make_inputs
from trainers.progress import Progress, silent
from trainers.students.families.base import Config, Context, Family, Inputs, State
from trainers.students.fits import solve_maps
from trainers.students.plan import BlockPlan
from trainers.students.surgery import Fits, make_block


@torch.no_grad()
def analyse(
    teacher: nn.Module,
    family: Family,
    latents: Latents,
    candidates: Sequence[BlockPlan],
    config: AnalyseConfig,
    seed: int,
    progress: Progress | None = None,
) -> Analysis:
    """Measure a frozen teacher and estimate the damage of each candidate replacement.

    The estimate of a span is the squared change of the velocity when all its blocks but the first
    give way to their linear probes; of another FFN or text, the mean over its blocks of what it
    does to one alone, added to that: FFNs narrowed by their channels' importance, linear maps
    fitted in closed form. Both are measured through the rest of the teacher. Trained replacements
    do better; the order is what counts.
    """
    progress = progress or silent()
    blocks = list(family.block_modules(teacher))
    max_span = max(block.length for block in candidates)
    batches = list(_calibration(teacher, latents, config, seed))
    total = 2 * len(batches)

    effects = _Effects(len(blocks), config.bands, candidates)
    wanted = wanted_maps(family, dict(cast("Any", teacher).config), candidates)
    statistics = Statistics()
    for index, (inputs, _) in enumerate(batches):
        per_batch = share(config.tokens, len(batches))
        found = gather(teacher, family, inputs, index, wanted, per_batch, seed)
        statistics.add(found)
        progress.update(index + 1, total)
    solutions = {key: sums.probe() for key, sums in statistics.probes.items()}
    probes = {name: [solutions[i, name].weight for i in range(len(blocks))] for name in STREAMS}
    fits = solve_maps(statistics.maps)
    for index, (inputs, bands) in enumerate(batches):
        _measure_effects(effects, teacher, family, blocks, inputs, bands, probes, fits)
        progress.update(len(batches) + index + 1, total)

    samples = {name: statistics.samples(name) for name in STREAMS}
    maps = {name: cka_map(samples[name][1:], config.kernel) for name in STREAMS}
    chains = {
        name: _chains(samples[name], probes[name], max_span, config.kernel) for name in STREAMS
    }
    return Analysis(
        bands=_band_names(config.bands),
        importance=effects.importance(),
        influence=(cosine_influence(samples["image"]) + cosine_influence(samples["text"])) / 2,
        ffn_error=_ffn_errors(family, dict(cast("Any", teacher).config), statistics),
        image_cka=maps["image"],
        text_cka=maps["text"],
        image_chain=chains["image"],
        text_chain=chains["text"],
        damages=effects.damages(),
        ridged=sum(solution.ridged for solution in solutions.values()),
    )


def wanted_maps(
    family: Family, config: Config, candidates: Sequence[BlockPlan]
) -> dict[int, set[str]]:
    """The linear maps that are fitted to each block: those of the candidates, and of all FFNs."""
    wanted = {i: set(_ffn_maps(family, config, i)) for i in range(family.blocks(config))}
    for block in candidates:
        for variant in [] if block.depth_only else _variants(block):
            wanted[variant.span[0]].update(family.maps(variant))
    return wanted


def _ffn_errors(family: Family, config: Config, statistics: Statistics) -> Tensor:
    errors = []
    for i in range(family.blocks(config)):
        names = _ffn_maps(family, config, i)
        found = [statistics.maps[i, name].error() for name in names]
        errors.append(sum(found) / len(found) if found else math.inf)
    return torch.tensor(errors)


class _Effects:
    """Squared changes of the velocity, summed over calibration pictures."""

    def __init__(self, blocks: int, bands: int, candidates: Sequence[BlockPlan]) -> None:
        self._candidates = candidates
        self.spans = {block.span: 0.0 for block in candidates if block.length > 1}
        self.variants = {
            variant: 0.0
            for block in candidates
            if not block.depth_only
            for variant in _variants(block)
        }
        self._skipped = torch.zeros(blocks, bands, dtype=torch.float64)
        self._counts = torch.zeros(bands, dtype=torch.float64)
        self._pictures = 0

    def count(self, bands_B: Tensor) -> None:
        self._counts += torch.bincount(bands_B, minlength=len(self._counts))
        self._pictures += len(bands_B)

    def skipped(self, block: int, change_B: Tensor, bands_B: Tensor) -> None:
        self._skipped[block].index_add_(0, bands_B, change_B.double().cpu())

    def importance(self) -> Tensor:
        return (self._skipped / self._counts).float()

    def damages(self) -> dict[BlockPlan, float]:
        found: dict[BlockPlan, float] = {}
        for block in self._candidates:
            total = self.spans.get(block.span, 0.0)
            if not block.depth_only:
                # The replacement starts from any one of its blocks: their mean.
                changed = [self.variants[variant] for variant in _variants(block)]
                total += sum(changed) / len(changed)
            found[block] = total / self._pictures
        return found


def _measure_effects(
    effects: _Effects,
    teacher: nn.Module,
    family: Family,
    blocks: Sequence[nn.Module],
    inputs: Inputs,
    bands_B: Tensor,
    probes: dict[str, list[Tensor]],
    fits: Fits,
) -> None:
    states, context = _states(teacher, family, blocks, inputs)
    velocity_BNC = family.end(teacher, states[-1], context).float()

    def change(state: State, after: int) -> Tensor:
        """Mean squared change of each picture's velocity if `state` came after block `after`."""
        for module in blocks[after + 1 :]:
            state = family.run_block(module, state, context)
        other_BNC = family.end(teacher, state, context).float()
        return (other_BNC - velocity_BNC).square().mean(dim=(1, 2))

    effects.count(bands_B)
    for i in range(len(blocks)):
        effects.skipped(i, change(states[i], i), bands_B)
    for first, last in effects.spans:
        state = states[first + 1]
        for i in range(first + 1, last + 1):
            state = State(
                _probed(state.text_BMD, probes["text"][i]),
                _probed(state.image_BND, probes["image"][i]),
            )
        effects.spans[first, last] += float(change(state, last).sum())
    config = dict(cast("Any", teacher).config)
    for variant in effects.variants:
        i = variant.span[0]
        changed = make_block(family, config, blocks, variant, fits=fits)
        after = family.run_block(changed, states[i], context)
        effects.variants[variant] += float(change(after, i).sum())


def _ffn_maps(family: Family, config: Config, i: int) -> tuple[str, ...]:
    """The maps that would stand for the FFNs of a block; none where it cannot have them."""
    linear = BlockPlan(span=(i, i), ffn="linear")
    return () if family.refusal(config, linear) else family.maps(linear)


def _variants(block: BlockPlan) -> list[BlockPlan]:
    """What the block changes beside its depth, at each of its blocks alone."""
    first, last = block.span
    alone = {"start": "first", "text_map": False}
    return [block.model_copy(update={"span": (i, i), **alone}) for i in range(first, last + 1)]


def _states(
    teacher: nn.Module, family: Family, blocks: Sequence[nn.Module], inputs: Inputs
) -> tuple[list[State], Context]:
    """The states before the first block and after each."""
    state, context = family.begin(teacher, inputs)
    states = [state]
    for module in blocks:
        state = family.run_block(module, state, context)
        states.append(state)
    return states, context


def _probed(state_BND: Tensor, probe_DD: Tensor) -> Tensor:
    return state_BND + state_BND @ probe_DD.to(state_BND)


def _chains(
    samples: Sequence[Tensor], probes: Sequence[Tensor], max_span: int, by: Kernel
) -> Tensor:
    kernels = [kernel(after_TD, by) for after_TD in samples[1:]]
    chain = torch.full((len(probes), max_span), math.nan)
    for u in range(len(probes)):
        state_TD = samples[u + 1]
        chain[u, 0] = 1.0
        for k in range(u + 1, min(u + max_span, len(probes))):
            state_TD = _probed(state_TD, probes[k].cpu())
            chain[u, k - u] = aligned(kernel(state_TD, by), kernels[k])
    return chain


def _calibration(
    teacher: nn.Module, latents: Latents, config: AnalyseConfig, seed: int
) -> Iterator[tuple[Inputs, Tensor]]:
    """Batches of inputs, and the band of each picture in them; band 0 is the noisiest."""
    example = next(teacher.parameters())
    pictures = latents.training[: config.pictures]
    wanted = [(picture, band) for picture in pictures for band in range(config.bands)]
    for start in range(0, len(wanted), config.batch_size):
        chosen = wanted[start : start + config.batch_size]
        batch = latents.batch([picture for picture, _ in chosen])
        bands_B = torch.tensor([band for _, band in chosen])
        generator = generator_at(seed, start, "analysis")
        noise_BNC = torch.randn(batch.clean_BNC.shape, generator=generator)
        t_B = 1 - (bands_B + torch.rand(len(chosen), generator=generator)) / config.bands
        batch = batch.to(example.device, example.dtype)
        yield make_inputs(batch, t_B, noise_BNC.to(batch.clean_BNC)), bands_B


def _band_names(bands: int) -> tuple[str, ...]:
    edges = [1 - i / bands for i in range(bands + 1)]
    return tuple(f"{low:.2g}–{high:.2g}" for high, low in itertools.pairwise(edges))
