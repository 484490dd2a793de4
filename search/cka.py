"""Linear centred kernel alignment: how alike two sets of states are, whatever their rotation.

Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019), equation 3.
Shapes: N tokens (the samples), D and E widths, S sets of states over the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Alignment in [0, 1] of two representations of the same N tokens; 1 up to rotation and scale.

    0 when either is constant. With fewer tokens than channels the value is biased upwards: compare
    only values measured on the same number of tokens.
    """
    return float(aligned(kernel(x_ND), kernel(y_NE)))


def kernel(x_ND: Tensor) -> Tensor:
    """The centred Gram matrix of the tokens, scaled to Frobenius norm 1, [N, N] float32.

    Zero when all tokens are equal.
    """
    x_ND = x_ND.double() - x_ND.double().mean(dim=0, keepdim=True)
    gram_NN = x_ND @ x_ND.T
    norm = gram_NN.norm()
    return (gram_NN / norm if norm > 0 else gram_NN).float()


def aligned(kernel_NN: Tensor, other_NN: Tensor) -> Tensor:
    """CKA of two kernels from `kernel`: their inner product."""
    return torch.dot(kernel_NN.flatten().double(), other_NN.flatten().double())


def cka_map(states: Sequence[Tensor]) -> Tensor:
    """CKA of every pair of S representations of the same tokens, [S, S] float32, symmetric."""
    kernels = torch.stack([kernel(x_ND).flatten() for x_ND in states])
    return (kernels @ kernels.T).clamp(0, 1)
