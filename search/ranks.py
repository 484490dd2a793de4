"""How alike two measures rank the same things."""

from __future__ import annotations

from collections.abc import Sequence


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, in [-1, 1]; None for fewer than three things, or when a measure tells none of
    them apart."""
    from scipy.stats import spearmanr

    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(spearmanr(one, other).statistic)
