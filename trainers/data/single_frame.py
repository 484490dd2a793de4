"""Qwen-Image's autoencoder on single pictures, without its third dimension.

The autoencoder is a video model whose convolutions look back in time. Before a picture there are
only zeros, so of a kernel's time taps just the last one meets data: a 2-D convolution gives the
same sums, about four times faster on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

if TYPE_CHECKING:
    from torch import Tensor, nn


class SingleFrameConv(QwenImageCausalConv3d):
    """The same weights and the same sums as its parent on one frame without history."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] != 1 or cache_x is not None:
            return super().forward(x, cache_x)
        frame = F.pad(x[:, :, 0], self._padding[:4])
        taken = F.conv2d(frame, self.weight[:, :, -1], self.bias, self.stride[1:])
        return taken.unsqueeze(2)


def for_single_frames(vae: nn.Module) -> nn.Module:
    """Lets the autoencoder's convolutions take the short way; its weights stay where they are."""
    for module in vae.modules():
        if type(module) is QwenImageCausalConv3d:
            module.__class__ = SingleFrameConv
    return vae
