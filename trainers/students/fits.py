"""Fits the linear maps of a student to its teacher in closed form, from sums over calibration data.

A map learns what a teacher block adds (PPCL's text projections, end-of-run maps and linear FFNs).
Least squares needs only XᵀX and XᵀY, so no state outlives its batch.
Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainers.students.families.base import Family, Inputs, MapPair
from trainers.students.surgery import Fits

RIDGE = 1e-4
"""Added to a singular Gram matrix, relative to its mean diagonal."""
_SINGULAR = 1e-9
"""The smallest pivot, relative to the largest diagonal, that float32 products still resolve."""


@torch.no_grad()
def fit_maps(
    teacher: nn.Module,
    family: Family,
    batches: Iterable[Inputs],
    wanted: Mapping[int, Collection[str]],
) -> Maps:
    """The maps `wanted` of each teacher block, fitted in one pass of the teacher over `batches`.

    A name that a block cannot have (a projection of the first block's text) is left out.
    """
    return solve_maps(gather_maps(teacher, family, batches, wanted))


@torch.no_grad()
def gather_maps(
    teacher: nn.Module,
    family: Family,
    batches: Iterable[Inputs],
    wanted: Mapping[int, Collection[str]],
) -> dict[tuple[int, str], MapSums]:
    """The sums that `wanted` maps are fitted from, by block and name; see `fit_maps`."""
    wanted = {i: names for i, names in wanted.items() if names}
    sums: dict[tuple[int, str], MapSums] = {}
    for inputs in batches if wanted else ():
        state, context = family.begin(teacher, inputs)
        for i, block in enumerate(family.block_modules(teacher)):
            if i > max(wanted):
                break
            if i not in wanted:
                state = family.run_block(block, state, context)
                continue
            state, pairs = family.map_pairs(block, state, context)
            for name in sorted(set(wanted[i]) & set(pairs)):
                add_sums(sums, (i, name), MapSums.of(*map_tokens(pairs[name], inputs.mask_BM)))
    return sums


class Maps(NamedTuple):
    """Fitted maps."""

    fits: Fits
    ridged: frozenset[tuple[int, str]]
    """Those, by block and name, whose system was singular and had to be ridged."""


def solve_maps(sums: Mapping[tuple[int, str], MapSums]) -> Maps:
    """The maps themselves, from their sums."""
    fits: dict[int, dict[str, Tensor]] = {}
    ridged = set()
    for (i, name), total in sums.items():
        weight_DD, bias_D, singular = total.solved()
        fits.setdefault(i, {}).update({f"{name}.weight": weight_DD, f"{name}.bias": bias_D})
        if singular:
            ridged.add((i, name))
    return Maps(fits, frozenset(ridged))


class Solution(NamedTuple):
    """Of a least-squares system."""

    weight: Tensor
    """[D, E] float32."""
    ridged: bool
    """Whether the system was singular and had to be ridged."""


def least_squares(gram_DD: Tensor, cross_DE: Tensor) -> Solution:
    """The matrix W [D, E] of least squared ‖X W − Y‖, from XᵀX and XᵀY.

    A singular system, of fewer tokens than channels for one, is ridged. A residual probe has
    Y = block(X) − X.
    """
    gram, cross = gram_DD.double(), cross_DE.double()
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    ridged = bool(info > 0) or bool(pivots.min() < _SINGULAR * gram.diagonal().max())
    if ridged:
        ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram + ridge * eye)
    return Solution(torch.cholesky_solve(cross, factor).float(), ridged)


def trained_probe(probe_DD: Tensor, sums: MapSums, steps: int) -> Tensor:
    """The probe after `steps` of steepest descent on its mean squared error over all tokens, which
    the sums give exactly; steps are as long as lowers the error most.

    PPCL trains its probes after the closed form, on the same error: a probe of a regular system is
    at the minimum already, one that had to be ridged comes nearer to it.
    """
    weight = probe_DD.double()
    for _ in range(steps):
        slope_DD = sums.gram_DD @ weight - sums.cross_DD
        bend = (slope_DD * (sums.gram_DD @ slope_DD)).sum()
        if not bend > 0:
            break
        weight = weight - slope_DD * (slope_DD.square().sum() / bend)
    return weight.float()


def map_tokens(pair: MapPair, mask_BM: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a map reads and should add, [T, D] float32 each, without padding."""
    if pair.text and mask_BM is not None:
        return pair.read[mask_BM].float(), pair.added[mask_BM].float()
    return pair.read.flatten(0, 1).float(), pair.added.flatten(0, 1).float()


@dataclass
class MapSums:
    """Sums over tokens of what a map reads and should add, and of their products, in float64.

    Those of several parts add up to those of the whole.
    """

    count: int
    read_D: Tensor
    added_D: Tensor
    gram_DD: Tensor
    cross_DD: Tensor
    square: Tensor
    """Of all that should be added, a scalar."""

    @classmethod
    def of(cls, read_TD: Tensor, added_TD: Tensor) -> MapSums:
        return cls(
            len(read_TD),
            read_TD.sum(0).double(),
            added_TD.sum(0).double(),
            (read_TD.T @ read_TD).double(),
            (read_TD.T @ added_TD).double(),
            added_TD.square().sum().double(),
        )

    def add(self, other: MapSums) -> None:
        """Adds another part's, in place."""
        self.count += other.count
        for name in _TENSORS:
            getattr(self, name).add_(getattr(other, name))

    def to(self, device: torch.device | str) -> MapSums:
        """These sums on a device."""
        return MapSums(self.count, *(getattr(self, name).to(device) for name in _TENSORS))

    def probe(self) -> Solution:
        """The linear probe of least squares, without a bias."""
        return least_squares(self.gram_DD, self.cross_DD)

    def solved(self) -> tuple[Tensor, Tensor, bool]:
        """Weight [D, D] as `nn.Linear` has it, bias [D], and whether the system was ridged."""
        solution = least_squares(*self._centred())
        weight_DD = solution.weight.T.contiguous()
        bias_D = (self.added_D - weight_DD.double() @ self.read_D) / self.count
        return weight_DD, bias_D.float(), solution.ridged

    def error(self) -> float:
        """What the fitted map leaves, as a part of what a constant would; 0 is exact."""
        gram_DD, cross_DD = self._centred()
        weight_DD = least_squares(gram_DD, cross_DD).weight.double()
        whole = self.square - self.added_D.square().sum() / self.count
        explained = 2 * (weight_DD * cross_DD).sum()
        left = whole - explained + ((gram_DD @ weight_DD) * weight_DD).sum()
        return float(left / whole.clamp_min(torch.finfo(torch.float64).tiny))

    def _centred(self) -> tuple[Tensor, Tensor]:
        gram_DD = self.gram_DD - self.read_D.outer(self.read_D) / self.count
        return gram_DD, self.cross_DD - self.read_D.outer(self.added_D) / self.count


def add_sums(total: dict[tuple[int, str], MapSums], key: tuple[int, str], sums: MapSums) -> None:
    """Adds another part's under their block and name, in place."""
    if key in total:
        total[key].add(sums)
    else:
        total[key] = sums


_TENSORS = ("read_D", "added_D", "gram_DD", "cross_DD", "square")
