"""What the judge's score costs: every judged student over each cost that was sought or bounded, and
which of them no other beats in all that was sought, that score included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from search.budget import Currency
from search.pareto import pareto_front
from search.report.canvas import Drawing, Theme, axes, figure, label, legend
from search.report.data import FinalistFacts, ReportData
from search.report.pareto import AXES, costs_shown, whole_and_part
from search.report.words import amount, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 2
"""One judged student is no comparison."""


def judged_drawings(data: ReportData) -> list[Drawing]:
    """A figure for every such cost that the judged students have."""
    return [_drawing(data, c) for c in costs_shown(data) if len(_shown(data, c)) >= FEWEST]


def judged_front(data: ReportData) -> list[FinalistFacts]:
    """The judged students that no other beats in the judge's score and all that plans are scored
    by, as far as that was measured of every one."""
    judged = [each for each in data.finalists if each.judge_score is not None]
    costs = [c for c in data.objectives if c != "fidelity_loss"]
    known = [c for c in costs if all(each.amount(c) is not None for each in judged)]

    def values(each: FinalistFacts) -> tuple[float, ...]:
        fixed = (-(each.judge_score or 0.0), each.loss_after or 0.0)
        return (*fixed, *(each.amount(c) or 0 for c in known))

    return pareto_front(judged, values)


def _shown(data: ReportData, cost: Currency) -> list[FinalistFacts]:
    known = (each for each in data.finalists if each.judge_score is not None)
    return [each for each in known if each.amount(cost) is not None]


def _drawing(data: ReportData, cost: Currency) -> Drawing:
    shown, whole = _shown(data, cost), data.teacher_scores
    said = "; ".join(
        f"{data.asked(each.budget)}: {percent(each.judge_score or 0.0)} with "
        f"{amount(each.amount(cost) or 0, cost)}{', published' if each.chosen else ''}"
        for each in shown
    )
    return Drawing(
        name="judged" if cost == "parameters" else f"judged-{cost}",
        alt=(
            f"Scatter plot of {len(shown)} judged students, {AXES[cost]} against judge score. "
            f"{said}." + (f" The teacher: {percent(whole.overall)}." if whole else "")
        ),
        caption=(
            "Every student that was recovered and judged; a star is published. A ring marks those "
            "that no other beats in the judge’s score and all else that was sought. "
            "The line across is the teacher’s score, dotted lines are the budgets."
        ),
        draw=lambda theme: _draw(data, cost, shown, theme),
    )


def _draw(data: ReportData, cost: Currency, shown: Sequence[FinalistFacts], theme: Theme) -> Figure:
    drawn = figure(540, 430, theme)
    ax = axes(drawn, theme, grid="y")
    for colour, budget in theme.coloured(data.budgets):
        mine = [each for each in shown if each.budget == budget.label]
        for chosen, sign, size in ((False, "o", 42), (True, "*", 150)):
            some = [each for each in mine if each.chosen == chosen]
            if some:
                ax.scatter(
                    [each.amount(cost) or 0 for each in some],
                    [each.judge_score or 0.0 for each in some],
                    marker=sign, s=size, color=colour, edgecolor=theme.surface, zorder=4,
                    label=f"{budget.asked}{' student' if chosen else ', another finalist'}",
                )  # fmt: skip
        if budget.currency == cost and budget.limit is not None:
            ax.axvline(budget.limit, color=theme.muted, linewidth=1, linestyle=":", zorder=1)
    front = [each for each in judged_front(data) if each in shown]
    ax.scatter(
        [each.amount(cost) or 0 for each in front], [each.judge_score or 0.0 for each in front],
        s=260, zorder=3, facecolor="none", edgecolor=theme.ink, linewidth=1, label="Pareto in all",
    )  # fmt: skip
    if data.teacher_scores is not None:
        overall = data.teacher_scores.overall
        ax.axhline(overall, color=theme.ink, linewidth=1.2, zorder=2, label="teacher")
    whole = data.teacher.amount(cost)
    teacher = f" (teacher: {amount(whole, cost)})" if whole else ""
    label(ax, theme, AXES[cost] + teacher, "judge score")
    ax.yaxis.set_major_formatter(lambda y, _: percent(round(y, 3)))
    ax.xaxis.set_major_formatter(lambda x, _: whole_and_part(x, whole, cost))
    ax.margins(x=0.12, y=0.12)
    ax.locator_params("x", nbins=5)
    legend(ax, theme)
    return drawn
