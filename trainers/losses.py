"""What students are trained to match.

Shapes: B batch, N tokens of one stream, D width, C latent channels of a packed token. A mask is
[B, N], true for tokens that count. All losses are computed in float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainers.flow import velocity_target
from trainers.students.families.base import State


def depth_loss(student_BND: Tensor, teacher_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Squared distance of L2-normalised tokens: sum over D, mean over B, N.

    One stream; callers weigh text and image equally (PPCL, depth distillation). Blind to
    magnitude. In [0, 4].
    """
    student_BND = F.normalize(student_BND.float(), dim=-1)
    teacher_BND = F.normalize(teacher_BND.float(), dim=-1)
    return _mean((student_BND - teacher_BND).square().sum(-1), mask_BN)


def magnitude_loss(
    student_BND: Tensor, teacher_BND: Tensor, mask_BN: Tensor | None = None
) -> Tensor:
    """Squared error relative to the teacher's energy: mean over tokens of both, then their ratio.

    What `depth_loss` cannot see. One ratio for the whole stream, so tokens with a small norm do
    not dominate it.
    """
    student_BND, teacher_BND = student_BND.float(), teacher_BND.float()
    error = _mean((student_BND - teacher_BND).square().sum(-1), mask_BN)
    return error / _mean(teacher_BND.square().sum(-1), mask_BN)


def stream_loss(
    student_BND: Tensor, teacher_BND: Tensor, mask_BN: Tensor | None, magnitude: float
) -> Tensor:
    """`depth_loss` plus `magnitude` times `magnitude_loss` of one stream."""
    loss = depth_loss(student_BND, teacher_BND, mask_BN)
    if magnitude > 0:
        loss = loss + magnitude * magnitude_loss(student_BND, teacher_BND, mask_BN)
    return loss


def span_loss(
    student: State,
    teacher: State,
    mask_BM: Tensor | None = None,
    magnitude: float = 0.0,
    text: bool = True,
) -> Tensor:
    """How far a replacement's state after its span is from the teacher's: text + image, equally.

    `mask_BM` leaves padded text tokens out. `text=False` leaves the text stream out: after the
    teacher's last block nothing reads it. `magnitude=0` is PPCL's loss.
    """
    loss = stream_loss(student.image_BND, teacher.image_BND, None, magnitude)
    if text:
        loss = loss + stream_loss(student.text_BMD, teacher.text_BMD, mask_BM, magnitude)
    return loss


def velocity_loss(student_BNC: Tensor, teacher_BNC: Tensor) -> Tensor:
    """Mean squared difference of two predicted velocities."""
    return F.mse_loss(student_BNC.float(), teacher_BNC.float())


def diffusion_loss(velocity_BNC: Tensor, clean_BNC: Tensor, noise_BNC: Tensor) -> Tensor:
    """Mean squared difference of a predicted velocity and the path's own."""
    return F.mse_loss(velocity_BNC.float(), velocity_target(clean_BNC, noise_BNC).float())


def _mean(values_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    if mask_BN is None:
        return values_BN.mean()
    weight_BN = mask_BN.to(values_BN.dtype)
    return (values_BN * weight_BN).sum() / weight_BN.sum()
