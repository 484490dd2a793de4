"""AdamW and its learning rate, as every training here uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.02
"""Both as PPCL trains."""


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW over many tensors at once; a tensor without a gradient is left as it is."""
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The share of the highest learning rate at a step: up linearly, then down a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
