"""Flow matching as Qwen-Image and FLUX.1 do it: straight paths from data (t = 0) to noise (t = 1).

Shapes: B batch, N image tokens, C latent channels of a packed token.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def noised(clean_BNC: Tensor, noise_BNC: Tensor, t_B: Tensor) -> Tensor:
    """The point at time t of the straight path from data to noise; t in [0, 1]."""
    t_B11 = t_B.to(clean_BNC.dtype).view(-1, 1, 1)
    return (1 - t_B11) * clean_BNC + t_B11 * noise_BNC


def velocity_target(clean_BNC: Tensor, noise_BNC: Tensor) -> Tensor:
    """What the model predicts: the path's velocity, the same at every t."""
    return noise_BNC - clean_BNC


def sample_timesteps(count: int, generator: Generator, shift: float = 1.0) -> Tensor:
    """Times in (0, 1), [count], one from each of `count` equal strata, in random order.

    Each time alone is uniform (then shifted); together they cover the interval, which makes the
    loss of a small batch far less noisy than independent draws do. `shift` above 1 moves them
    towards noise, as schedulers do for large pictures.
    """
    strata = torch.randperm(count, generator=generator)
    return shifted((strata + torch.rand(count, generator=generator)) / count, shift)


def grid_timesteps(count: int) -> Tensor:
    """The fixed times at which fidelity is measured, [count]: the middles of equal strata."""
    return (torch.arange(count) + 0.5) / count


def shifted(t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise: shift · t / (1 + (shift − 1) · t); 1 leaves them alone."""
    return shift * t / (1 + (shift - 1) * t)


def pack(latents_BCHW: Tensor) -> Tensor:
    """Latents as the transformer reads them: each 2 × 2 patch is one token of 4 C channels."""
    batch, channels, rows, columns = latents_BCHW.shape
    patches = latents_BCHW.view(batch, channels, rows // 2, 2, columns // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(
        batch, rows // 2 * (columns // 2), channels * 4
    )
