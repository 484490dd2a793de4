"""The look that all figures share: two colour themes, one size of type, PNG bytes out.

Figures are sized in CSS pixels and drawn at twice that resolution. matplotlib is imported late
(0.5 s) and without pyplot, so that drawing touches no global state and needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Item = TypeVar("Item")

PIXELS_PER_INCH = 100
POINTS = 72 / PIXELS_PER_INCH
"""Points a CSS pixel: matplotlib wants type and line sizes in points."""


@dataclass(frozen=True)
class Theme:
    """Colours of one scheme; `surface` is the page's `--surface`, so figures have no edge."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    neutral: str
    series: tuple[str, ...]
    """Told apart by people with any colour vision; students take them in order."""
    spans: tuple[str, ...]
    """Fills of neighbouring spans."""

    def coloured(self, items: Sequence[Item]) -> list[tuple[str, Item]]:
        """Students, or budgets, with the colour that each has in every figure."""
        return [(self.series[i % len(self.series)], item) for i, item in enumerate(items)]


LIGHT = Theme(
    name="light", surface="#ffffff", ink="#1d2521", muted="#5d6963", grid="#e3e8e4",
    neutral="#d3dbd5",
    series=("#c2410c", "#1d5fd1", "#7c3aed", "#0f766e", "#a16207"),
    spans=("#86c5a0", "#f0b97a", "#9dbcea"),
)  # fmt: skip
DARK = Theme(
    name="dark", surface="#1a211d", ink="#e6ece8", muted="#9fada5", grid="#313b35",
    neutral="#46524b",
    series=("#fb923c", "#7aa9ff", "#b899ff", "#3fc9b6", "#e3b341"),
    spans=("#3f8f61", "#b97a31", "#4f78b8"),
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in either theme, with what it shows in words."""

    name: str
    """File name without ending."""
    alt: str
    """What someone who cannot see it needs to know."""
    caption: str
    draw: Callable[[Theme], Figure]

    def png(self, theme: Theme) -> bytes:
        """The picture in one theme."""
        return png(self.draw(theme))


def figure(width: int, height: int, theme: Theme) -> Figure:
    """An empty figure, in CSS pixels."""
    from matplotlib.figure import Figure

    size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    return Figure(figsize=size, facecolor=theme.surface, layout="constrained")


def axes(
    drawn: Figure,
    theme: Theme,
    *,
    grid: Literal["x", "y", "both"] | None = None,
    panel: tuple[int, int] = (1, 1),
) -> Axes:
    """A pair of axes: open frame, quiet ticks, lines at those of `grid`.

    The only one of the figure, or that of one `panel`: its place from the left, counted from 1, and
    how many there are.
    """
    place, panels = panel
    ax = drawn.add_subplot(1, panels, place)
    ax.set_facecolor(theme.surface)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(theme.grid)
    ax.tick_params(colors=theme.muted, labelsize=12 * POINTS, which="both", length=0)
    if grid is not None:
        ax.set_axisbelow(True)
        ax.grid(axis=grid, color=theme.grid, linewidth=0.8)
    return ax


def label(ax: Axes, theme: Theme, x: str, y: str) -> None:
    """Name both axes."""
    ax.set_xlabel(x, color=theme.muted, fontsize=12.5 * POINTS)
    ax.set_ylabel(y, color=theme.muted, fontsize=12.5 * POINTS)


def legend(ax: Axes, theme: Theme, columns: int = 3) -> None:
    """The legend, above the axes: never over a point."""
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, frameon=False,
        borderaxespad=0, handletextpad=0.4, columnspacing=1.2,
        labelcolor=theme.ink, fontsize=12 * POINTS,
    )  # fmt: skip


def plain_log(axis: Axis) -> None:
    """Ticks like 0.05 instead of powers of ten, some also where the axis spans no whole decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def png(drawn: Figure) -> bytes:
    """A figure as PNG, two pixels for every CSS pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    body = io.BytesIO()
    FigureCanvasAgg(drawn)
    drawn.savefig(body, format="png", dpi=2 * PIXELS_PER_INCH)
    return body.getvalue()
