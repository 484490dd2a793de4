"""Centred kernel alignment: how alike two sets of states are, whatever their rotation.

Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019), equation 3.
Shapes: N tokens (the samples), D and E widths, S sets of states over the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]


def cka(x_ND: Tensor, y_NE: Tensor, by: Kernel = "linear") -> float:
    """Alignment in [0, 1] of two representations of the same N tokens; 1 up to rotation and scale.

    0 when either is constant. With fewer tokens than channels the value is biased upwards: compare
    only values measured on the same number of tokens.
    """
    return float(aligned(kernel(x_ND, by), kernel(y_NE, by)))


def kernel(x_ND: Tensor, by: Kernel = "linear") -> Tensor:
    """The centred kernel matrix of the tokens, scaled to Frobenius norm 1, [N, N] float32.

    `rbf` is exp(−d² / 2m²) of distances d with their median m. Zero when all tokens are equal.
    """
    x_ND = x_ND.double() - x_ND.double().mean(dim=0, keepdim=True)
    if by == "linear":
        gram_NN = x_ND @ x_ND.T
    else:
        square_NN = torch.cdist(x_ND, x_ND).square()
        apart = square_NN[~torch.eye(len(x_ND), dtype=torch.bool, device=x_ND.device)]
        median = apart.median().clamp_min(torch.finfo(torch.float64).tiny)
        gram_NN = torch.exp(-square_NN / (2 * median))
        gram_NN = gram_NN - gram_NN.mean(0) - gram_NN.mean(1, keepdim=True) + gram_NN.mean()
    norm = gram_NN.norm()
    return (gram_NN / norm if norm > 0 else gram_NN).float()


def aligned(kernel_NN: Tensor, other_NN: Tensor) -> Tensor:
    """CKA of two kernels from `kernel`: their inner product."""
    return torch.dot(kernel_NN.flatten().double(), other_NN.flatten().double())


def cka_map(states: Sequence[Tensor], by: Kernel = "linear") -> Tensor:
    """CKA of every pair of S representations of the same tokens, [S, S] float32, symmetric."""
    kernels = torch.stack([kernel(x_ND, by).flatten() for x_ND in states])
    return (kernels @ kernels.T).clamp(0, 1)
