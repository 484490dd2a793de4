"""How much of a batch is in a model at once while something is measured."""

from __future__ import annotations

from trainers.data.latents import shares
from trainers.students.families.base import Inputs

TOKENS = 32_768
"""Image and text tokens of one pass at most, unless one picture has more: 7 pictures of 1024 pixels
a side. Enough for a GPU to be busy; a pass of Qwen-Image then takes 2.7 GiB beside the weights."""


def passes(inputs: Inputs) -> list[slice]:
    """Rows of a batch that pass through a model together. They depend on the batch alone, not
    on the device, so that every machine sums up the same parts."""
    count = len(inputs.noisy_BNC)
    most = max(1, TOKENS // (inputs.noisy_BNC.shape[1] + inputs.embeds_BMD.shape[1]))
    return [slice(first, last) for first, last in shares(count, -(-count // most))]
