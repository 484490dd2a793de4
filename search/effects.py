"""What the velocity makes of a change at one block of the teacher, summed over pictures.

Each change is measured through the rest of the teacher: the block left out (Amber's importance by
residual ablation), the block replaced by its linear probe, and the block with another FFN or text.
A span's damage is the sum of its blocks' (see `Effects.damages`), so a longer list of spans costs
no pass. Shapes: B batch, N image tokens, M text tokens, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainers.students.families.base import Config, Family, Inputs, State
from trainers.students.plan import BlockPlan
from trainers.students.surgery import Fits, make_block

Probes = Mapping[tuple[int, str], Tensor]
"""The residual linear probe [D, D] of each block and stream."""


@dataclass
class Effects:
    """Squared changes of the velocity; those of several parts add up to those of the whole."""

    left_out: Tensor
    """[L, bands] float64: summed over the pictures of a band."""
    pictures: Tensor
    """[bands] float64: pictures in each band."""
    probed: Tensor
    """[L] float64: summed over pictures, the block's probe in its place."""
    variants: dict[BlockPlan, float]
    """Summed over pictures, for each single block with another FFN or text."""

    @classmethod
    def none(cls, blocks: int, bands: int, variants: Sequence[BlockPlan]) -> Effects:
        return cls(
            torch.zeros(blocks, bands, dtype=torch.float64),
            torch.zeros(bands, dtype=torch.float64),
            torch.zeros(blocks, dtype=torch.float64),
            dict.fromkeys(variants, 0.0),
        )

    def add(self, other: Effects) -> None:
        """Adds another part's, in place."""
        for name in ("left_out", "pictures", "probed"):
            getattr(self, name).add_(getattr(other, name))
        for variant, change in other.variants.items():
            self.variants[variant] += change

    def importance(self) -> Tensor:
        """[L, bands]: the mean squared change when the block's residual is left out."""
        return (self.left_out / self.pictures).float()

    def damages(self, candidates: Sequence[BlockPlan]) -> dict[BlockPlan, float]:
        """The estimated damage of each candidate alone in the teacher.

        Of a span, the sum over its blocks but the first of what their probes do alone: on the
        miniature this orders spans as measuring each whole chain does (benchmarks/README.md). Of
        another FFN or text, the mean over the span's blocks, since the replacement starts from any
        one of them, added to that.
        """
        pictures = float(self.pictures.sum())
        found = {}
        for block in candidates:
            first, last = block.span
            total = float(self.probed[first + 1 : last + 1].sum())
            if not block.depth_only:
                changed = [self.variants[variant] for variant in single_blocks(block)]
                total += sum(changed) / len(changed)
            found[block] = total / pictures
        return found


def changed_blocks(candidates: Sequence[BlockPlan]) -> list[BlockPlan]:
    """The single blocks with another FFN or text that stand for the candidates'."""
    found = (single_blocks(block) for block in candidates if not block.depth_only)
    return list(dict.fromkeys(variant for variants in found for variant in variants))


def single_blocks(block: BlockPlan) -> list[BlockPlan]:
    """What the block changes beside its depth, at each of its blocks alone."""
    first, last = block.span
    alone = {"start": "first", "text_map": False}
    return [block.model_copy(update={"span": (i, i), **alone}) for i in range(first, last + 1)]


@torch.no_grad()
def measure(
    effects: Effects,
    teacher: nn.Module,
    family: Family,
    inputs: Inputs,
    bands_B: Tensor,
    probes: Probes,
    fits: Fits,
) -> None:
    """Adds the effects of what passes together, pictures in the time bands `bands_B`.

    The states between blocks are made once more rather than kept from the pass that gives the
    velocity: one pass more beside one for each change, and no state of 60 blocks to hold.
    """
    effects.pictures += torch.bincount(bands_B, minlength=len(effects.pictures))
    blocks = list(family.block_modules(teacher))
    config: Config = dict(cast("Any", teacher).config)
    state, context = family.begin(teacher, inputs)

    def velocity(state: State, first: int) -> Tensor:
        """Of the rest of the teacher, whose first block is `first`."""
        for module in blocks[first:]:
            state = family.run_block(module, state, context)
        return family.end(teacher, state, context).float()

    velocity_BNC = velocity(state, 0)

    def change(state: State, after: int) -> Tensor:
        """Mean squared change of each picture's velocity if `state` came after block `after`."""
        other_BNC = velocity(state, after + 1)
        return (other_BNC - velocity_BNC).square().mean(dim=(1, 2)).double().cpu()

    for i, block in enumerate(blocks):
        effects.left_out[i].index_add_(0, bands_B, change(state, i))
        if i > 0:
            after = State(
                probed(state.text_BMD, probes[i, "text"]),
                probed(state.image_BND, probes[i, "image"]),
            )
            effects.probed[i] += change(after, i).sum()
        for variant in effects.variants:
            if variant.span[0] == i:
                changed = make_block(family, config, blocks, variant, fits=fits)
                after = family.run_block(changed, state, context)
                effects.variants[variant] += float(change(after, i).sum())
        state = family.run_block(block, state, context)


def probed(state_BND: Tensor, probe_DD: Tensor) -> Tensor:
    """The state after a block, by its residual linear probe."""
    return state_BND + state_BND @ probe_DD.to(state_BND)
