"""Each loss against a plain NumPy reference written from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.losses import (
    depth_loss,
    diffusion_loss,
    magnitude_loss,
    span_loss,
    velocity_loss,
)
from trainers.students.families.base import State


def reference_depth(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> float:
    distances = []
    for b in range(len(student)):
        for n in range(student.shape[1]):
            if mask is not None and not mask[b, n]:
                continue
            s, t = student[b, n].double().numpy(), teacher[b, n].double().numpy()
            distances.append(np.sum((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2))
    return float(np.mean(distances))


def reference_magnitude(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> float:
    rows = slice(None) if mask is None else mask.numpy()
    s, t = student.double().numpy()[rows], teacher.double().numpy()[rows]
    return float(np.sum((s - t) ** 2) / np.sum(t**2))


def pair(seed: int, batch: int = 2, tokens: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, tokens, width, generator=generator)
    return student * 3, teacher


@given(seed=st.integers(0, 1000))
def test_depth_loss_is_its_definition_and_within_bounds(seed: int):
    student, teacher = pair(seed)
    loss = depth_loss(student, teacher).item()
    assert loss == pytest.approx(reference_depth(student, teacher), rel=1e-4)
    assert 0 <= loss <= 4


def test_depth_loss_reaches_its_bounds_and_is_blind_to_magnitude():
    _, teacher = pair(0)
    assert depth_loss(17 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert depth_loss(-teacher, teacher).item() == pytest.approx(4, rel=1e-5)


def test_magnitude_loss_sees_what_depth_loss_does_not():
    student, teacher = pair(1)
    assert magnitude_loss(student, teacher).item() == pytest.approx(
        reference_magnitude(student, teacher), rel=1e-4
    )
    assert magnitude_loss(3 * teacher, teacher).item() == pytest.approx(4, rel=1e-5)


def test_padded_tokens_do_not_count():
    student, teacher = pair(2)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    poisoned = torch.where(mask[..., None], student, torch.full_like(student, 1e6))
    for loss, reference in ((depth_loss, reference_depth), (magnitude_loss, reference_magnitude)):
        assert loss(poisoned, teacher, mask).item() == pytest.approx(
            reference(student, teacher, mask), rel=1e-4
        )


def test_span_loss_weighs_both_streams_equally():
    student, teacher = State(*pair(3)), State(*pair(4))
    text = reference_depth(student.text_BMD, teacher.text_BMD)
    image = reference_depth(student.image_BND, teacher.image_BND)
    assert span_loss(student, teacher).item() == pytest.approx(text + image, rel=1e-4)
    assert span_loss(student, teacher, text=False).item() == pytest.approx(image, rel=1e-4)
    magnitudes = reference_magnitude(student.text_BMD, teacher.text_BMD)
    magnitudes += reference_magnitude(student.image_BND, teacher.image_BND)
    assert span_loss(student, teacher, magnitude=0.5).item() == pytest.approx(
        text + image + magnitudes / 2, rel=1e-4
    )


def test_velocity_and_diffusion_loss_are_mean_squares():
    student, teacher = pair(5)
    expected = float(((student - teacher).double() ** 2).mean())
    assert velocity_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    noise, clean = pair(6)
    expected = float(((student - (noise - clean)).double() ** 2).mean())
    assert diffusion_loss(student, clean, noise).item() == pytest.approx(expected, rel=1e-5)


def test_losses_of_half_precision_states_are_float32():
    student, teacher = (x.bfloat16() for x in pair(7))
    assert depth_loss(student, teacher).dtype == torch.float32
    assert velocity_loss(student, teacher).dtype == torch.float32
