"""Whether cheap tiers rank as dear ones do: fidelity losses of the same plans at two tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from search.report.canvas import Drawing, Theme, axes, figure, label, legend
from search.report.data import ReportData, TierPair, tier_pairs
from search.report.words import tier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tier_drawings(data: ReportData) -> list[Drawing]:
    """A figure for every two tiers that can be compared for some budget."""
    pairs = [pair for pair in tier_pairs(data.finalists) if pair.spearman is not None]
    both = dict.fromkeys((pair.lower, pair.upper) for pair in pairs)
    return [_drawing(data, [p for p in pairs if (p.lower, p.upper) == pair]) for pair in both]


def _drawing(data: ReportData, pairs: list[TierPair]) -> Drawing:
    lower, upper = tier(pairs[0].lower), tier(pairs[0].upper)
    asked = {budget.label: budget.asked for budget in data.budgets}
    said = ", ".join(
        f"{pair.spearman:.2f} for {asked.get(pair.budget, pair.budget)} ({len(pair.points)} points)"
        for pair in pairs
    )
    return Drawing(
        name=f"tiers-{pairs[0].lower:g}-{pairs[0].upper:g}",
        alt=f"Scatter plot of fidelity loss {lower} and {upper}. Spearman’s rho: {said}.",
        caption=(
            f"Fidelity loss of the same plans {lower} and {upper} of recovery. Where points rise "
            "together, the earlier measure picks what the later one would; where they do not, more "
            f"must go on from it. Rank correlation (Spearman, 1 = the same order): {said}. Only "
            "what went on is here: of plans that were alike to begin with, the order says little."
        ),
        draw=lambda theme: _draw(data, pairs, theme),
    )


def _draw(data: ReportData, pairs: list[TierPair], theme: Theme) -> Figure:
    """A panel a budget: budgets lie too far apart for the order within one to be seen."""
    drawn = figure(max(540, 300 * len(pairs)), 330, theme)
    labels = [budget.label for budget in data.budgets]
    lower, upper = (f"fidelity loss {tier(part)}" for part in (pairs[0].lower, pairs[0].upper))
    for number, pair in enumerate(pairs, start=1):
        ax = axes(drawn, theme, grid="both", panel=(number, len(pairs)))
        place = labels.index(pair.budget)
        before, after = zip(*pair.points, strict=True)
        ax.scatter(
            before, after, s=36, zorder=3, edgecolor=theme.surface, linewidth=0.7,
            facecolor=theme.series[place % len(theme.series)],
            label=f"for {data.budgets[place].asked}, rho {pair.spearman:.2f}",
        )  # fmt: skip
        ax.margins(0.12)
        ax.locator_params(nbins=4)
        label(ax, theme, lower, upper if number == 1 else "")
        legend(ax, theme)
    return drawn
