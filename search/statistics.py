"""What the analysis sums up in one pass of the teacher over the calibration pictures.

Probes, maps and CKA are all solved from these sums and from the states of a few tokens; no state
outlives its batch. Sums of several parts add up to those of the whole, in float64, so that how the
batches were shared out does not show. Shapes: T sampled tokens, D width, L blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from trainers.data.latents import generator_at
from trainers.passes import passes
from trainers.students.families.base import Config, Family, Inputs, MapPair, State
from trainers.students.fits import MapSums, add_sums, map_tokens

STREAMS = ("image", "text")


@dataclass
class Statistics:
    """Sums by name and block, and sampled states by stream and batch."""

    maps: dict[tuple[int, str], MapSums] = field(default_factory=dict)
    """Of the linear maps that were asked for; see Family.maps."""
    probes: dict[tuple[int, str], MapSums] = field(default_factory=dict)
    """Of the residual linear probe of each block and stream."""
    sampled: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    """[T, D] before the first block and after each, on the CPU."""

    def add(self, other: Statistics) -> None:
        """Adds another part's, in place; batches must differ."""
        for mine, theirs in ((self.maps, other.maps), (self.probes, other.probes)):
            for key, sums in theirs.items():
                add_sums(mine, key, sums)
        self.sampled |= other.sampled

    def take(self, block: int | None) -> Statistics:
        """Removes and returns the sums of one block, or with None the sampled states, for whichever
        worker solves them."""
        if block is None:
            taken, self.sampled = Statistics(sampled=self.sampled), {}
            return taken
        taken = Statistics()
        for mine, its in ((self.maps, taken.maps), (self.probes, taken.probes)):
            for key in [key for key in mine if key[0] == block]:
                its[key] = mine.pop(key)
        return taken

    def to(self, device: torch.device | str) -> Statistics:
        """These sums on a device."""
        return Statistics(
            {key: sums.to(device) for key, sums in self.maps.items()},
            {key: sums.to(device) for key, sums in self.probes.items()},
            self.sampled,
        )

    def samples(self, stream: str) -> list[Tensor]:
        """The states [T, D] of a stream before the first block and after each."""
        batches = sorted(batch for name, batch in self.sampled if name == stream)
        parts = [self.sampled[stream, batch] for batch in batches]
        return [torch.cat(states) for states in zip(*parts, strict=True)]


@torch.no_grad()
def gather(
    total: Statistics,
    teacher: nn.Module,
    family: Family,
    inputs: Inputs,
    batch: int,
    wanted: Mapping[int, Collection[str]],
    tokens: int,
    seed: int,
) -> None:
    """Adds the statistics of one batch, in one pass: the maps `wanted` of each block, the probes,
    and the states of `tokens` tokens of each stream, drawn by the number of the batch.

    Block after block, so that the teacher's device holds the sums of one block, and the states of
    the batch before it; the total stays on the CPU.
    """
    parts = [inputs.rows(rows) for rows in passes(inputs)]
    begun = (family.begin(teacher, part) for part in parts)
    states, contexts = (list(column) for column in zip(*begun, strict=True))
    generator = generator_at(seed, batch, "tokens")
    chosen = {name: _drawn(states, parts, name, tokens, generator) for name in STREAMS}

    def sampled(name: str) -> Tensor:
        drawn = zip(states, parts, chosen[name], strict=True)
        return torch.cat([_sampled(state, part, name, some) for state, part, some in drawn])

    samples = {name: [sampled(name)] for name in STREAMS}
    for i, block in enumerate(family.block_modules(teacher)):
        own = Statistics()
        for n, part in enumerate(parts):
            state = states[n]
            after, pairs = family.map_pairs(block, state, contexts[n])
            for name in sorted(set(wanted.get(i, ())) & set(pairs)):
                add_sums(own.maps, (i, name), MapSums.of(*map_tokens(pairs[name], part.mask_BM)))
            for name, pair in (
                ("image", MapPair(state.image_BND, after.image_BND - state.image_BND, text=False)),
                ("text", MapPair(state.text_BMD, after.text_BMD - state.text_BMD, text=True)),
            ):
                add_sums(own.probes, (i, name), MapSums.of(*map_tokens(pair, part.mask_BM)))
            states[n] = after
        total.add(own.to("cpu"))
        for name in STREAMS:
            samples[name].append(sampled(name))
    total.sampled |= {(name, batch): samples[name] for name in STREAMS}


def memory(
    config: Config, family: Family, wanted: Mapping[int, Collection[str]], tokens: int
) -> int:
    """Bytes of a machine's own memory that the statistics of a teacher take, in each worker."""
    width, blocks = family.width(config), family.blocks(config)
    systems = 2 * blocks + sum(len(names) for names in wanted.values())
    samples = 2 * (blocks + 1) * tokens * width * 4
    return systems * 2 * width**2 * 8 + samples


def cosine_influence(states: Sequence[Tensor]) -> Tensor:
    """[L]: 1 − the mean cosine of tokens before and after each block (ShortGPT)."""
    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
        for a, b in itertools.pairwise(states)
    ]
    return 1 - torch.stack(cosines)


def share(tokens: int, batches: int) -> int:
    """Tokens that each batch gives."""
    return math.ceil(tokens / batches)


def _tokens(state: State, inputs: Inputs, stream: str) -> Tensor:
    """One stream's tokens that are not padding, [tokens, D] float32."""
    if stream == "image":
        return state.image_BND.flatten(0, 1).float()
    text_BMD = state.text_BMD.float()
    return text_BMD.flatten(0, 1) if inputs.mask_BM is None else text_BMD[inputs.mask_BM]


def _drawn(
    states: Sequence[State], parts: Sequence[Inputs], stream: str, tokens: int, generator: Generator
) -> list[Tensor]:
    """Numbers of each part's tokens that are sampled, drawn from those of the whole batch."""
    counts = [len(_tokens(*part, stream)) for part in zip(states, parts, strict=True)]
    chosen_T = torch.randperm(sum(counts), generator=generator)[:tokens]
    ends = itertools.accumulate(counts)
    firsts = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return [chosen_T[(first <= chosen_T) & (chosen_T < end)] - first for first, end in firsts]


def _sampled(state: State, inputs: Inputs, stream: str, chosen: Tensor) -> Tensor:
    tokens_TD = _tokens(state, inputs, stream)
    return tokens_TD[chosen.to(tokens_TD.device)].cpu()
