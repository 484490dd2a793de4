"""CKA against the textbook, and the properties that make it worth using."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from search.cka import cka, cka_map


def textbook(x_ND: Tensor, y_NE: Tensor) -> float:
    """Kornblith et al. (2019), from HSIC with an explicit centring matrix."""
    n = len(x_ND)
    centre = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k, m = x_ND.double() @ x_ND.double().T, y_NE.double() @ y_NE.double().T

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ centre @ b @ centre) / (n - 1) ** 2

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator) + 3
    return x, x @ torch.randn(12, 7, generator=generator) + torch.randn(50, 7, generator=generator)


def test_agrees_with_the_textbook(pair: tuple[Tensor, Tensor]) -> None:
    assert cka(*pair) == pytest.approx(textbook(*pair), abs=1e-5)


def test_the_rbf_kernel_agrees_with_the_textbook(pair: tuple[Tensor, Tensor]) -> None:
    def gram(x: Tensor) -> Tensor:
        square = (x.double()[:, None] - x.double()[None]).square().sum(-1)
        pairs = [float(square[i, j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return torch.exp(-square / (2 * sorted(pairs)[(len(pairs) - 1) // 2]))

    n = len(pair[0])
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = (centre @ gram(x) @ centre for x in pair)
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert cka(*pair, "rbf") == pytest.approx(float(expected), abs=1e-5)
    assert cka(pair[0], 3 * pair[0] + 1, "rbf") == pytest.approx(1, abs=1e-5)


def test_rotation_scale_and_shift_change_nothing(pair: tuple[Tensor, Tensor]) -> None:
    x, _ = pair
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    assert cka(x, 5 * x @ rotation + 2) == pytest.approx(1, abs=1e-5)


def test_a_constant_state_is_like_nothing(pair: tuple[Tensor, Tensor]) -> None:
    x, _ = pair
    assert cka(x, torch.ones(50, 3)) == 0


def test_the_map_holds_every_pair(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    states = [x, y, x + 1]
    found = cka_map(states)
    expected = torch.tensor([[textbook(a, b) for b in states] for a in states])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
