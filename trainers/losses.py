"""What students are trained to match.

Shapes: B batch, N tokens of one stream, D width, C latent channels of a packed token. A mask is
[B, N], true for tokens that count. All losses are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.flow import velocity_target
from trainers.students.families.base import State


class Totals(NamedTuple):
    """What the sums over a stream's tokens are divided by: the whole batch's, also where a loss
    sees only a part of it, so that the losses of the parts add up to the loss of the whole."""

    tokens: Tensor
    """How many count, a float32 scalar."""
    energy: Tensor
    """Sum of their squared norms, likewise."""


def totals(teacher_BND: Tensor, mask_BN: Tensor | None = None) -> Totals:
    """The totals of one stream of the teacher's."""
    energy_BN = torch.linalg.vector_norm(teacher_BND, dim=-1, dtype=torch.float32).square()
    if mask_BN is None:
        return Totals(energy_BN.new_tensor(float(energy_BN.numel())), energy_BN.sum())
    weight_BN = mask_BN.to(energy_BN.dtype)
    return Totals(weight_BN.sum(), (energy_BN * weight_BN).sum())


def together(parts: Sequence[Totals]) -> Totals:
    """The totals of a batch from those of its parts."""
    return Totals(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))


def depth_loss(
    student_BND: Tensor,
    teacher_BND: Tensor,
    mask_BN: Tensor | None = None,
    whole: Totals | None = None,
) -> Tensor:
    """Squared distance of L2-normalised tokens: sum over D, mean over B, N.

    One stream; callers weigh text and image equally (PPCL, depth distillation). Blind to
    magnitude. In [0, 4]. `whole` is for a part of a batch, see Totals.
    """
    student_BND = F.normalize(student_BND.float(), dim=-1)
    teacher_BND = F.normalize(teacher_BND.float(), dim=-1)
    whole = whole or totals(teacher_BND, mask_BN)
    return _sum((student_BND - teacher_BND).square().sum(-1), mask_BN) / whole.tokens


def magnitude_loss(
    student_BND: Tensor,
    teacher_BND: Tensor,
    mask_BN: Tensor | None = None,
    whole: Totals | None = None,
) -> Tensor:
    """Squared error relative to the teacher's energy: sums over all tokens of both, their ratio.

    What `depth_loss` cannot see. One ratio for the whole stream, so tokens with a small norm do
    not dominate it. `whole` is for a part of a batch, see Totals.
    """
    student_BND, teacher_BND = student_BND.float(), teacher_BND.float()
    whole = whole or totals(teacher_BND, mask_BN)
    return _sum((student_BND - teacher_BND).square().sum(-1), mask_BN) / whole.energy


def stream_loss(
    student_BND: Tensor,
    teacher_BND: Tensor,
    mask_BN: Tensor | None,
    magnitude: float,
    whole: Totals | None = None,
) -> Tensor:
    """`depth_loss` plus `magnitude` times `magnitude_loss` of one stream."""
    whole = whole or totals(teacher_BND, mask_BN)
    loss = depth_loss(student_BND, teacher_BND, mask_BN, whole)
    if magnitude > 0:
        loss = loss + magnitude * magnitude_loss(student_BND, teacher_BND, mask_BN, whole)
    return loss


def span_loss(
    student: State,
    teacher: State,
    mask_BM: Tensor | None = None,
    magnitude: float = 0.0,
    text: bool = True,
    whole: tuple[Totals, Totals] | None = None,
) -> Tensor:
    """How far a replacement's state after its span is from the teacher's: text + image, equally.

    `mask_BM` leaves padded text tokens out. `text=False` leaves the text stream out: after the
    teacher's last block nothing reads it. `magnitude=0` is PPCL's loss. `whole` has the totals of
    text and image, where the states are a part of a batch.
    """
    text_whole, image_whole = whole or (None, None)
    loss = stream_loss(student.image_BND, teacher.image_BND, None, magnitude, image_whole)
    if text:
        loss = loss + stream_loss(
            student.text_BMD, teacher.text_BMD, mask_BM, magnitude, text_whole
        )
    return loss


def velocity_loss(student_BNC: Tensor, teacher_BNC: Tensor) -> Tensor:
    """Mean squared difference of two predicted velocities."""
    return F.mse_loss(student_BNC.float(), teacher_BNC.float())


def diffusion_loss(velocity_BNC: Tensor, clean_BNC: Tensor, noise_BNC: Tensor) -> Tensor:
    """Mean squared difference of a predicted velocity and the path's own."""
    return F.mse_loss(velocity_BNC.float(), velocity_target(clean_BNC, noise_BNC).float())


def _sum(values_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    return values_BN.sum() if mask_BN is None else (values_BN * mask_BN.to(values_BN.dtype)).sum()
