"""What was chosen and what it led to: plans and schedules as lines over axes that a person can
read, and in which of those choices the best ones differ from the rest.

Parallel coordinates and importance are Optuna's figures in this page's look. Importance is
PED-ANOVA's, as in optuna-dashboard: it asks what tells the best results from all of them, needs no
model of the loss, and so stays honest with choices that depend on one another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search.features import (
    PLAN_READING,
    SCHEDULE_READING,
    plan_features,
    schedule_features,
)
from search.report.canvas import POINTS, Drawing, Theme, axes, figure, legend
from search.report.data import ReportData
from search.report.words import count, loss, percent, tier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Mapping[str, float]

FEWEST_LINES = 3
"""Fewer plans or schedules are read in their table."""
FEWEST_RANKED = 20
"""Results that importance asks for: its best quarter is then five, as Optuna advises."""
BEST = 0.25
"""The part of the results that counts as best."""
LOSS = "fidelity loss"


@dataclass(frozen=True)
class Choices:
    """Results of one kind and budget."""

    asked: str
    """The budget, as the config wrote it."""
    colour: int
    """Which of a theme's series the budget has."""
    chosen: tuple[Values, ...]
    """What was chosen for each."""
    ended: tuple[Values, ...]
    """What each led to, the loss among it."""
    loss: str = LOSS
    """Name of the loss that ranks them."""

    @property
    def losses(self) -> list[float]:
        return [values[self.loss] for values in self.ended]


Ranked = tuple[Choices, Values]
"""Results, and the importance of what was chosen for them."""


def parallel_drawings(data: ReportData) -> list[Drawing]:
    """Plans and schedules of every budget that has enough of them."""
    return [
        _parallel(each, name, what)
        for name, what, kind in (
            ("parallel-plans", "plans", plans_of(data)),
            ("parallel-schedules", "schedules", schedules_of(data)),
        )
        for each in kind
        if len(each.losses) >= FEWEST_LINES and len(_varied(each.chosen)) > 1
    ]


def importance_drawings(data: ReportData) -> list[Drawing]:
    """What good plans differ in, and good schedules, where there are enough of them."""
    made = []
    for name, what, kind in (
        ("important-plans", "plans", plans_of(data)),
        ("important-schedules", "schedules", schedules_of(data)),
    ):
        found = [(each, importances(each.chosen, each.losses)) for each in kind]
        found = [(each, shares) for each, shares in found if shares]
        if found:
            made.append(_importance(found, name, what))
    return made


def plans_of(data: ReportData) -> list[Choices]:
    """The scored plans of every budget."""
    made = []
    for colour, budget in enumerate(data.budgets):
        trials = [
            t for t in data.trials if t.budget == budget.label and t.fidelity_loss is not None
        ]
        chosen = tuple(plan_features(trial.plan) for trial in trials)
        ended = tuple(
            {
                "parameters": trial.parameters,
                **({} if trial.damage is None else {"summed damage": trial.damage}),
                LOSS: trial.fidelity_loss or 0.0,
            }
            for trial in trials
        )
        made.append(Choices(budget.asked, colour, chosen, ended))
    return made


def schedules_of(data: ReportData) -> list[Choices]:
    """The schedules by which plans of every budget were recovered, by the loss at the first tier:
    all were measured there, and few went on."""
    made = []
    for colour, budget in enumerate(data.budgets):
        ran = [f for f in data.finalists if f.budget == budget.label and len(f.losses) > 1]
        first = min((list(each.losses)[1] for each in ran), default=1.0)
        ran = [each for each in ran if first in each.losses]
        chosen = tuple(schedule_features(each.schedule) for each in ran)
        loss = LOSS if first == 1 else f"loss {tier(first)}"
        ended = tuple(
            {f"loss {tier(0)}": each.losses[0.0], loss: each.losses[first]} for each in ran
        )
        made.append(Choices(budget.asked, colour, chosen, ended, loss))
    return made


def importances(chosen: Sequence[Values], losses: Sequence[float]) -> dict[str, float]:
    """How much each choice tells the results of lowest loss from all of them: shares that sum to 1,
    largest first. Empty where there are fewer than FEWEST_RANKED, or they are all alike."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    varied = _varied(chosen)
    if len(losses) < FEWEST_RANKED or len(varied) < 2 or len(set(losses)) == 1:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    distributions = {
        name: optuna.distributions.FloatDistribution(low, high)
        for name, (low, high) in varied.items()
    }
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: values[name] for name in varied},
                distributions=distributions,
                value=value,
            )
            for values, value in zip(chosen, losses, strict=True)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is experimental
        evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
        shares = get_param_importances(study, evaluator=evaluator)
    return shares if sum(shares.values()) > 0 else {}


def _varied(rows: Sequence[Values]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of what all rows have and is not the same in all."""
    names = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
    ends = {name: (min(r[name] for r in rows), max(r[name] for r in rows)) for name in names}
    return {name: (low, high) for name, (low, high) in ends.items() if low < high}


def _parallel(each: Choices, name: str, what: str) -> Drawing:
    rows = [{**a, **b} for a, b in zip(each.chosen, each.ended, strict=True)]
    varied = _varied(rows)
    same = {n: v for n, v in rows[0].items() if n not in varied}
    best = min(rows, key=lambda row: row[each.loss])
    of_best = ", ".join(f"{axis} {_said(axis, best[axis])}" for axis in varied)
    alike = ", ".join(f"{axis} {_said(axis, value)}" for axis, value in same.items())
    return Drawing(
        name=f"{name}-{each.asked.replace('%', 'pct')}",
        alt=f"Parallel coordinates of {len(rows)} {what} for {each.asked}. The best: {of_best}.",
        caption=(
            f"Each line is one of the {len(rows)} {what} for {each.asked}, from what was chosen at "
            f"the left to its {each.loss} at the right; the stronger its colour, the lower its "
            "loss. The thick line is the best. Where strong lines run together, good "
            f"{what} have that choice in common. "
            + (PLAN_READING if what == "plans" else SCHEDULE_READING)
            + (f" The same in all: {alike}." if alike else "")
        ),
        draw=lambda theme: _draw_parallel(rows, varied, each, theme),
    )


def _draw_parallel(
    rows: Sequence[Values],
    varied: Mapping[str, tuple[float, float]],
    each: Choices,
    theme: Theme,
) -> Figure:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    drawn = figure(900, 360, theme)
    ax = axes(drawn, theme)
    places = [_placed(name, varied[name]) for name in varied]
    # The best are drawn last, over the others.
    ordered = sorted(rows, key=lambda row: -row[each.loss])
    lines = [
        [(x, place(row[name])) for x, (name, place) in enumerate(zip(varied, places, strict=True))]
        for row in ordered
    ]
    colour = theme.series[each.colour % len(theme.series)]
    scale = LinearSegmentedColormap.from_list("losses", [theme.neutral, colour])
    ranks = [i / max(len(lines) - 1, 1) for i in range(len(lines))]
    ax.add_collection(LineCollection(lines, colors=scale(ranks), linewidths=1.2, alpha=0.8))
    ax.plot(*zip(*lines[-1], strict=True), color=colour, linewidth=3, zorder=3)
    ax.vlines(range(len(varied)), 0, 1, color=theme.muted, linewidth=0.8, zorder=1)
    for x, (name, (low, high)) in enumerate(varied.items()):
        for value, y, side in ((high, 1.02, "bottom"), (low, -0.02, "top")):
            ax.text(
                x, y, _said(name, value), ha="center", va=side,
                color=theme.muted, fontsize=11.5 * POINTS,
            )  # fmt: skip
    ax.set(xlim=(-0.4, len(varied) - 0.6), ylim=(-0.1, 1.1))
    ax.set_xticks(range(len(varied)), ["\n".join(name.rsplit(" ", 1)) for name in varied])
    ax.tick_params(axis="x", colors=theme.ink, labelsize=12 * POINTS)
    _bare(ax)
    return drawn


def _placed(name: str, ends: tuple[float, float]) -> Callable[[float], float]:
    """Where an axis shows a value: 0 at its low end, 1 at its high one."""
    low, high = ends
    if low > 0 and (name == "summed damage" or "loss" in name or name.endswith(" lr")):
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _said(name: str, value: float) -> str:
    if name == "parameters":
        return count(value)
    if name in ("FFN kept", "merge depth"):
        return percent(round(value, 2))
    return loss(value)


def _importance(
    found: Sequence[tuple[Choices, Mapping[str, float]]], name: str, what: str
) -> Drawing:
    names = sorted(
        {n for _, shares in found for n in shares},
        key=lambda n: -sum(shares.get(n, 0.0) for _, shares in found),
    )
    first = "; ".join(
        f"{each.asked}: {', '.join(f'{n} {percent(s)}' for n, s in list(shares.items())[:3])}"
        for each, shares in found
    )
    return Drawing(
        name=name,
        alt=f"Bar chart of the importance of choices for {what}. Largest: {first}.",
        caption=(
            f"What tells the best quarter of the {what} from all that were tried, each choice by "
            "itself (PED-ANOVA); the bars of a budget sum to 100%. A long bar: good ones have "
            "other values there than the rest. Which values, the parallel lines show."
        ),
        draw=lambda theme: _draw_importance(found, names, theme),
    )


def _draw_importance(found: Sequence[Ranked], names: Sequence[str], theme: Theme) -> Figure:
    high = 0.8 / len(found)
    drawn = figure(540, 50 + round(len(names) * max(30, 20 * len(found))), theme)
    ax = axes(drawn, theme)
    for i, (each, shares) in enumerate(found):
        colour = theme.series[each.colour % len(theme.series)]
        places = [row + (i + 0.5) * high - 0.4 for row in range(len(names))]
        lengths = [shares.get(name, 0.0) for name in names]
        ax.barh(places, lengths, height=0.9 * high, color=colour, label=f"for {each.asked}")
        for y, length in zip(places, lengths, strict=True):
            ax.annotate(
                percent(round(length, 2)), (length, y), xytext=(5, 0), textcoords="offset points",
                va="center", color=theme.muted, fontsize=11.5 * POINTS,
            )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", colors=theme.ink)
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    legend(ax, theme)
    return drawn


def _bare(ax: Axes) -> None:
    """Without frame and value axis: every axis of the figure is drawn by itself."""
    ax.yaxis.set_visible(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
