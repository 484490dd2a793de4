"""The optimisation history: every trial in its place, and the best so far within each budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from search.budget import Currency
from search.report.canvas import Drawing, Theme, axes, figure, label, legend, plain_log
from search.report.data import BudgetFacts, ReportData, TrialFacts
from search.report.words import loss
from search.samplers import SAMPLERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = {"exact": "D", "uniform": "s", "ppcl": "^", "amber": "v"} | dict.fromkeys(SAMPLERS, "o")
OTHER_MARKER = "P"
"""For origins that a later searcher brings."""


def marker(origin: str) -> str:
    """The sign that stands for an origin in every figure."""
    return MARKERS.get(origin, OTHER_MARKER)


def origins(trials: Iterable[TrialFacts]) -> list[str]:
    """Who proposed the trials, each once, known signs first."""
    return sorted({trial.origin for trial in trials}, key=lambda o: (o not in MARKERS, o))


def best_so_far(
    trials: Sequence[TrialFacts], limit: float, currency: Currency = "parameters"
) -> list[tuple[int, float]]:
    """(trial number, lowest fidelity loss up to it) over the trials that cost at most `limit`.

    The last point repeats the lowest loss at the last trial, so that the line reaches the end.
    """
    line: list[tuple[int, float]] = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        value, amount = trial.fidelity_loss, trial.amount(currency)
        fits = limit == math.inf or (amount is not None and amount <= limit)
        if value is not None and fits and (not line or value < line[-1][1]):
            line.append((trial.number, value))
    if line:
        line.append((max(trial.number for trial in trials), line[-1][1]))
    return line


def history_drawing(data: ReportData) -> Drawing:
    failed = sum(trial.state == "failed" for trial in data.trials)
    best = min(t.fidelity_loss for t in data.trials if t.fidelity_loss is not None)
    return Drawing(
        name="trials",
        alt=(
            f"Fidelity loss of {len(data.trials)} trials in the order they were proposed; lowest "
            f"{loss(best)}; {failed} failed. {_won(data)}"
        ),
        caption=(
            "The search in the order it proposed: a colour is a budget, a sign who proposed. A "
            "line is the best plan so far that fits its budget; where it steps down, the search "
            "found what its starting points had not. Exact plans and those of rules are starting "
            f"points, the sampler learns from all before it. {_won(data)}"
            + (f" Crosses at the top: {failed} failed trials." if failed else "")
        ),
        draw=lambda theme: _draw(data, theme),
    )


def _best_within(data: ReportData, budget: BudgetFacts) -> list[tuple[int, float]]:
    limit = math.inf if budget.limit is None else budget.limit
    return best_so_far(data.trials, limit, budget.currency)


def _won(data: ReportData) -> str:
    """Who proposed the best plan of each budget, in a sentence."""
    by_number = {trial.number: trial for trial in data.trials}
    said = []
    for budget in data.budgets:
        line = _best_within(data, budget)
        if line:
            # The last point only repeats the best one.
            best = by_number[line[-2][0]]
            said.append(f"{budget.asked} by {best.origin} at trial {best.number}")
    return f"Best found: {', '.join(said)}." if said else ""


def _draw(data: ReportData, theme: Theme) -> Figure:
    drawn = figure(540, 430, theme)
    ax = axes(drawn, theme, grid="y")
    colours = {b.label: theme.series[i % len(theme.series)] for i, b in enumerate(data.budgets)}
    for origin in origins(data.trials):
        proposed = [t for t in data.trials if t.origin == origin and t.fidelity_loss is not None]
        ax.scatter(
            [t.number for t in proposed], [t.fidelity_loss or 0.0 for t in proposed],
            marker=marker(origin), s=30, zorder=3, linewidth=0.7, edgecolor=theme.surface,
            facecolor=[colours.get(t.budget, theme.muted) for t in proposed],
        )  # fmt: skip
        if proposed:
            ax.scatter([], [], marker=marker(origin), s=30, color=theme.muted, label=origin)
    for budget in data.budgets:
        line = _best_within(data, budget)
        if line:
            ax.step(
                *zip(*line, strict=True), where="post", linewidth=1.8, zorder=2,
                color=colours[budget.label], label=f"best within {budget.asked}",
            )  # fmt: skip
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    failed = [trial for trial in data.trials if trial.state == "failed"]
    ax.scatter(
        [trial.number for trial in failed], [0.98] * len(failed), marker="x", s=25, linewidth=1,
        color=[colours.get(trial.budget, theme.muted) for trial in failed],
        transform=ax.get_xaxis_transform(),
    )  # fmt: skip
    ax.locator_params("x", integer=True)
    label(ax, theme, "trial", "fidelity loss")
    legend(ax, theme)
    return drawn
