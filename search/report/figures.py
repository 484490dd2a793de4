"""The figures of a report, each with an alt text and a caption that says what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from search.ranks import rank_correlation
from search.report.canvas import POINTS, Drawing, Theme, axes, figure, label, legend, plain_log
from search.report.choices import importance_drawings, parallel_drawings
from search.report.data import Matrix, PictureRow, ReportData
from search.report.history import history_drawing
from search.report.judged import judged_drawings
from search.report.pareto import pareto_drawings
from search.report.plan_picture import plan_drawing
from search.report.tiers import tier_drawings
from search.report.words import duration, percent, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_PICTURES = 12
"""Captions on the picture sheet, as many as a README shows."""


def drawings(data: ReportData) -> list[Drawing]:
    """Every figure that this sweep has data for, in the order of the page."""
    made: list[Drawing] = []
    if data.pictures:
        made.append(_pictures(data))
    made += judged_drawings(data)
    if any(trial.fidelity_loss is not None for trial in data.trials):
        made += [*pareto_drawings(data), history_drawing(data)]
    if any(_predicted(data, budget.label) for budget in data.budgets):
        made.append(_agreement(data))
    made += [*parallel_drawings(data), *importance_drawings(data), *tier_drawings(data)]
    if data.redundancy is not None:
        made.append(_cka(data, "image", data.redundancy.image_cka))
        made.append(_cka(data, "text", data.redundancy.text_cka))
        made.append(_importance(data))
    for student in data.students:
        title = f"the {data.asked(student.budget)} student"
        made.append(plan_drawing(student.plan, f"plan-{student.budget}", title))
    if data.costs:
        made.append(_cost(data))
    return made


def _predicted(data: ReportData, budget: str) -> list[tuple[float, float]]:
    """(summed damage, fidelity loss) of the trials of a budget that a log axis can show."""
    return [
        (trial.damage, trial.fidelity_loss)
        for trial in data.trials
        if trial.budget == budget and trial.damage and trial.fidelity_loss
    ]


def _agreement(data: ReportData) -> Drawing:
    shown = {b.asked: _predicted(data, b.label) for b in data.budgets}
    counted = ", ".join(f"{len(points)} at {asked}" for asked, points in shown.items())
    return Drawing(
        name="agreement",
        alt=f"Scatter plot of summed damage against measured fidelity loss: {counted} trials.",
        caption=(
            "What the exact solver goes by, the sum of what each replacement does alone in the "
            "teacher, against what the assembled student measures. Where points of one budget rise "
            "together (rank correlation near 1), the exact plans are the right ones to start from; "
            "where they do not, the search has something to find."
        ),
        draw=lambda theme: _draw_agreement(data, theme),
    )


def _draw_agreement(data: ReportData, theme: Theme) -> Figure:
    drawn = figure(540, 430, theme)
    ax = axes(drawn, theme, grid="both")
    for i, budget in enumerate(data.budgets):
        points = _predicted(data, budget.label)
        if points:
            damages, losses = zip(*points, strict=True)
            rho = rank_correlation(damages, losses)
            alike = "" if rho is None else f": rank correlation {rho:.2f}"
            ax.scatter(
                damages, losses, s=30, zorder=3, label=f"for {budget.asked}{alike}",
                facecolor=theme.series[i % len(theme.series)], edgecolor=theme.surface,
                linewidth=0.7,
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    label(ax, theme, "summed damage", "fidelity loss")
    legend(ax, theme)
    return drawn


def _cka(data: ReportData, stream: str, matrix: Matrix) -> Drawing:
    neighbours = [matrix[i][i + 1] for i in range(len(matrix) - 1)] or [1.0]
    merged = "; ".join(
        f"{data.asked(student.budget)}: "
        + (", ".join(span(*b.span) for b in student.plan.blocks if b.length > 1) or "none")
        for student in data.students
    )
    return Drawing(
        name=f"cka-{stream}",
        alt=(
            f"Heat map of linear CKA between the {stream} states after every two teacher blocks; "
            f"neighbours lie between {min(neighbours):.2f} and {max(neighbours):.2f}. "
            f"Merged spans: {merged or 'none'}."
        ),
        caption=(
            f"How alike the teacher’s {stream} states are after any two of its blocks (linear CKA, "
            "1 = the same up to rotation and scale). Bright squares on the diagonal are runs of "
            "blocks that change little. The steps frame the spans that each student merges."
        ),
        draw=lambda theme: _draw_cka(data, matrix, theme),
    )


def _draw_cka(data: ReportData, matrix: Matrix, theme: Theme) -> Figure:
    drawn = figure(520, 490, theme)
    ax = axes(drawn, theme)
    shown = ax.imshow(matrix, cmap="cividis", vmax=1.0, interpolation="nearest")
    for order, (colour, student) in enumerate(theme.coloured(data.students)):
        for block in student.plan.blocks:
            if block.length == 1:
                continue
            low, high = block.span[0] - 0.5, block.span[1] + 0.5
            # The matrix is symmetric: one student's frames stand above its diagonal, the next one's
            # below, and neither hides the other.
            above = ([low, high, high], [low, low, high])
            below = ([low, low, high], [low, high, high])
            halves = (above, below) if len(data.students) == 1 else ((above, below)[order % 2],)
            for xs, ys in halves:
                for line, line_colour in ((4.2, theme.surface), (2.4, colour)):
                    ax.plot(xs, ys, color=line_colour, linewidth=line, clip_on=False)
        ax.plot([], [], "s", markerfacecolor="none", markeredgewidth=1.9, color=colour,
                label=f"{data.asked(student.budget)} student")  # fmt: skip
    bar = drawn.colorbar(shown, ax=ax, shrink=0.86, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=12 * POINTS, length=0)
    ax.locator_params("x", integer=True)
    ax.locator_params("y", integer=True)
    label(ax, theme, "after block", "after block")
    if data.students:
        legend(ax, theme)
    return drawn


def _importance(data: ReportData) -> Drawing:
    assert data.redundancy is not None
    rows = data.redundancy.importance
    total = [sum(row) / max(len(row), 1) for row in rows]
    order = sorted(range(len(total)), key=total.__getitem__)
    least, most = (", ".join(map(str, sorted(part))) for part in (order[:3], order[-3:]))
    return Drawing(
        name="importance",
        alt=(
            f"Importance of {len(rows)} teacher blocks in {len(data.redundancy.bands)} timestep "
            f"bands, log scale. Least important on average: {least}; most: {most}."
        ),
        caption=(
            "What the teacher loses without one block: the squared change of its velocity when "
            "that block’s residual is left out, for each band of timesteps. Low blocks are the "
            "first candidates to be merged; a block whose lines lie far apart matters at one noise "
            "level more than at another."
        ),
        draw=lambda theme: _draw_importance(data, theme),
    )


def _draw_importance(data: ReportData, theme: Theme) -> Figure:
    assert data.redundancy is not None
    drawn = figure(900, 340, theme)
    ax = axes(drawn, theme, grid="y")
    columns = zip(*data.redundancy.importance, strict=True)
    for number, (band, column) in enumerate(zip(data.redundancy.bands, columns, strict=True)):
        ax.plot(
            column, "o-", markersize=4, linewidth=1.5, label=band,
            color=theme.series[(number + 1) % len(theme.series)],
        )  # fmt: skip
    ax.set_yscale("log")
    ax.locator_params("x", integer=True)
    label(ax, theme, "block left out", "change of the velocity")
    legend(ax, theme)
    return drawn


def _cost(data: ReportData) -> Drawing:
    ran = [cost for cost in data.costs if not cost.skipped]
    longest = max(ran, key=lambda cost: cost.seconds, default=None)
    share = percent(round(longest.seconds / (data.seconds or 1), 3)) if longest else ""
    return Drawing(
        name="cost",
        alt="Bar chart of wall time by stage: "
        + ", ".join(
            f"{c.name} {'reused' if c.skipped else duration(c.seconds)}" for c in data.costs
        )
        + ".",
        caption=(
            f"Where the {duration(data.seconds)} went"
            + (f": {longest.name} took {share}." if longest else ".")
            + " A stage whose output was already in storage is reused and costs nothing."
        ),
        draw=lambda theme: _draw_cost(data, theme),
    )


def _draw_cost(data: ReportData, theme: Theme) -> Figure:
    drawn = figure(560, 24 + 34 * len(data.costs), theme)
    ax = axes(drawn, theme)
    names = [cost.name for cost in data.costs]
    spent = [0.0 if cost.skipped else cost.seconds for cost in data.costs]
    ax.barh(names, spent, height=0.62, color=theme.spans[0])
    for place, (cost, seconds) in enumerate(zip(data.costs, spent, strict=True)):
        workers = f"{cost.workers} worker{'s' * (cost.workers != 1)}"
        words = "reused" if cost.skipped else f"{duration(seconds)} · {workers}"
        ax.annotate(
            words, (seconds, place), xytext=(5, 0), textcoords="offset points", va="center",
            color=theme.muted, fontsize=12 * POINTS,
        )  # fmt: skip
    ax.invert_yaxis()
    # Room for the words beside the longest bar.
    ax.set_xlim(0, (max(spent, default=0) or 1) * 1.42)
    ax.tick_params(axis="y", colors=theme.ink)
    # Every bar says its own time.
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    return drawn


def _pictures(data: ReportData) -> Drawing:
    rows = spread(data.pictures, SHEET_PICTURES)
    names = ", ".join(f"the {data.asked(student.budget)} student" for student in data.students)
    return Drawing(
        name="pictures",
        alt=f"Pictures by the teacher and by {names or 'no student'} for {len(rows)} captions.",
        caption="Same caption and same seed in every column.",
        draw=lambda theme: _draw_pictures(data, rows, theme),
    )


def spread(rows: Sequence[PictureRow], most: int) -> list[PictureRow]:
    """At most `most` rows, taken evenly from all: captions usually come family by family."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def _draw_pictures(data: ReportData, rows: Sequence[PictureRow], theme: Theme) -> Figure:
    """A sheet of cells, `across` captions a line, each caption over its pictures."""
    across = min(3, len(rows))
    names = ["teacher", *(student.budget for student in data.students)]
    lines = -(-len(rows) // across)
    side, head, foot, between = 96, 34, 22, 18
    wide = len(names) * side + between
    width, height = across * wide + between, lines * (head + side + foot) + between
    drawn = figure(width, height, theme)
    drawn.set_layout_engine("none")
    ax = drawn.add_axes((0, 0, 1, 1), frame_on=False)
    for number, row in enumerate(rows):
        left = between + number % across * wide
        top = between / 2 + number // across * (head + side + foot)
        ax.text(
            left, top + head - 8, _wrapped(row.caption, wide), va="bottom", color=theme.ink,
            fontsize=11.5 * POINTS, linespacing=1.15,
        )  # fmt: skip
        for column, name in enumerate(names):
            picture = row.teacher if name == "teacher" else row.students.get(name)
            if picture is None:
                continue
            x, y = left + column * side, top + head
            # Twice the cell is what the PNG shows; drawing all of a large picture takes seconds.
            small = picture.copy()
            small.thumbnail((2 * side, 2 * side))
            ax.imshow(small, extent=(x, x + side - 4, y + side - 4, y), interpolation="nearest")
            ax.text(
                x + side / 2 - 2, y + side + 5, name if name == "teacher" else data.asked(name),
                ha="center", va="center", color=theme.muted, fontsize=11 * POINTS,
            )  # fmt: skip
    # imshow sets the limits and the aspect to its own picture, so these come last.
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    ax.set_axis_off()
    return drawn


def _wrapped(caption: str, width: int) -> str:
    import textwrap

    lines = textwrap.wrap(caption, max(12, width // 7))
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")
