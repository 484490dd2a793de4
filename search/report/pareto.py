"""What fidelity costs: every scored plan, its fidelity loss over each cost that was sought or
bounded, a figure a cost. One cost over another is not drawn: it says nothing of the students'
worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from search.budget import Currency
from search.pareto import pareto_front
from search.report.canvas import Drawing, Theme, axes, figure, label, legend, plain_log
from search.report.data import ReportData, TrialFacts
from search.report.history import marker, origins
from search.report.words import amount, loss, percent
from search.samplers import SAMPLERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES: dict[Currency, str] = {
    "parameters": "parameters",
    "memory": "peak memory of a pass",
    "latency": "latency of a pass",
}


def pareto_drawings(data: ReportData) -> list[Drawing]:
    """A figure for every cost among the objectives and the budgets that the trials have."""
    return [_drawing(data, cost) for cost in costs_shown(data) if _shown(data, cost)]


def costs_shown(data: ReportData) -> list[Currency]:
    """The costs that were sought or bounded."""
    named = [o for o in data.objectives if o != "fidelity_loss"]
    return list(dict.fromkeys([*named, *(budget.currency for budget in data.budgets)]))


def whole_and_part(cost: float, whole: int | None, currency: Currency) -> str:
    """A tick of an axis of costs: what it is, and which part of the teacher's."""
    part = f"\n{percent(round(cost / whole, 2))}" if whole else ""
    return amount(cost, currency) + part


def _shown(data: ReportData, cost: Currency) -> list[TrialFacts]:
    """The trials that have a place in a figure."""
    return [t for t in data.trials if t.fidelity_loss is not None and t.amount(cost) is not None]


def _front(data: ReportData, cost: Currency) -> list[TrialFacts]:
    """Those of them that no other beats in both, by cost."""
    both = pareto_front(_shown(data, cost), lambda t: (t.amount(cost) or 0, t.fidelity_loss or 0.0))
    return sorted(both, key=lambda trial: trial.amount(cost) or 0)


def _elsewhere(data: ReportData, front: Sequence[TrialFacts]) -> list[TrialFacts]:
    """The trials of the whole Pareto set that a figure of one cost alone would not show as such."""
    joined = {trial.number for trial in front}
    return [t for t in data.trials if t.number in set(data.pareto) - joined]


def _drawing(data: ReportData, cost: Currency) -> Drawing:
    front = _front(data, cost)
    ends = (amount(trial.amount(cost) or 0, cost) for trial in (front[0], front[-1]))
    recovered = ", ".join(
        f"{data.asked(s.budget)} from {loss(s.loss_before)} to {loss(s.loss_after)}"
        for s in data.students
    )
    return Drawing(
        name="pareto" if cost == "parameters" else f"pareto-{cost}",
        alt=(
            f"Scatter plot of {len(_shown(data, cost))} trials, {AXES[cost]} against fidelity "
            f"loss; {len(front)} are on the Pareto front, {' to '.join(ends)}. "
            f"Recovery: {recovered or 'none yet'}."
        ),
        caption=(
            f"Every scored plan: further left {_LESS[cost]}, further down is closer to the "
            "teacher. The line joins the plans that no other beats in both. "
            + (
                "A ring marks a plan that none beats in all that was sought: it is better in "
                "what another of these figures shows. "
                if _elsewhere(data, front)
                else ""
            )
            + "A star is a published student; its arrow is what recovery won after assembly from "
            "the library. Dotted lines are the budgets."
            + ("" if cost == "parameters" else " Plans stand where they were measured as models.")
        ),
        draw=lambda theme: _draw(data, cost, front, theme),
    )


_LESS: dict[Currency, str] = {
    "parameters": "is smaller",
    "memory": "takes less memory",
    "latency": "is faster",
}


def _draw(data: ReportData, cost: Currency, front: Sequence[TrialFacts], theme: Theme) -> Figure:
    drawn = figure(540, 430, theme)
    ax = axes(drawn, theme, grid="y")
    _scatter(ax, data, cost, theme)
    ax.plot(
        [t.amount(cost) or 0 for t in front], [t.fidelity_loss or 0.0 for t in front],
        color=theme.ink, linewidth=1.2, zorder=2, label="Pareto",
    )  # fmt: skip
    rings = _elsewhere(data, front)
    if rings:
        ax.scatter(
            [t.amount(cost) or 0 for t in rings], [t.fidelity_loss or 0.0 for t in rings],
            s=80, zorder=2, facecolor="none", edgecolor=theme.ink, linewidth=1,
            label="Pareto in all",
        )  # fmt: skip
    for colour, student in theme.coloured(data.students):
        place = student.amount(cost)
        if place is None:
            continue
        ax.annotate(
            "", xy=(place, student.loss_after), xytext=(place, student.loss_before), zorder=4,
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkB": 5},
        )  # fmt: skip
        ax.scatter(
            place, student.loss_after, marker="*", s=150, color=colour, edgecolor=theme.surface,
            zorder=5, label=f"{data.asked(student.budget)} student",
        )  # fmt: skip
    for budget in data.budgets:
        if budget.currency == cost and budget.limit is not None:
            ax.axvline(budget.limit, color=theme.muted, linewidth=1, linestyle=":", zorder=1)
    ax.set_yscale("log")
    plain_log(ax.yaxis)
    whole = data.teacher.amount(cost)
    teacher = f" (teacher: {amount(whole, cost)})" if whole else ""
    label(ax, theme, AXES[cost] + teacher, "fidelity loss")
    ax.xaxis.set_major_formatter(lambda x, _: whole_and_part(x, whole, cost))
    ax.locator_params("x", nbins=5)
    legend(ax, theme)
    return drawn


def _scatter(ax: Axes, data: ReportData, cost: Currency, theme: Theme) -> None:
    """All trials that have a loss, a marker per origin."""
    shown = _shown(data, cost)
    for origin in origins(shown):
        mine = [trial for trial in shown if trial.origin == origin]
        ax.scatter(
            [t.amount(cost) or 0 for t in mine], [t.fidelity_loss or 0.0 for t in mine],
            marker=marker(origin), s=30, zorder=3, label=origin,
            facecolor=theme.neutral if origin in SAMPLERS else theme.ink,
            edgecolor=theme.muted, linewidth=0.7,
        )  # fmt: skip
