"""What a spike is: a loss far above those before it, from which training had better go back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Reversible
from itertools import islice

RECENT = 20
"""Steps before it that a loss is held against; a training younger than that has no spikes."""


def is_spike(loss: float, before: Reversible[float], factor: float) -> bool:
    """Whether a loss is over `factor` times the median of the last finite ones `before` it."""
    recent = list(islice(filter(math.isfinite, reversed(before)), RECENT))
    return len(recent) == RECENT and loss > factor * statistics.median(recent)
