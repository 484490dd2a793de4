"""A plan as a picture: which teacher blocks become which student block, how wide its FFNs are, and
what it starts from.

Used by the report and by the model card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from search.report.canvas import LIGHT, POINTS, Drawing, Theme, figure, png
from search.report.words import ffn, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainers.students.plan import BlockPlan, Plan, Start

LONGEST_ROW = 32
"""Teacher blocks in one row; a longer teacher is wrapped between two spans."""
CELL, MARGIN = 46, 84
"""CSS pixels: width of a block in a short row, and of the room for the words at the left."""
WIDEST = 940
LINEAR = 0.08
"""Height of a block with linear FFNs, as a part of the full one."""
HATCH = "///"
"""Of a block that starts untrained."""
_SOURCE: Mapping[Start, str] = {
    "first": "first block",
    "middle": "middle block",
    "average": "average",
}

READING = (
    "Above are the teacher’s blocks in the order they run, below the student’s. A colour fans the "
    "blocks of one span into the block that replaces them; a grey block is the teacher’s own. The "
    "height of a student block is the kept width of its FFNs, its dashed outline the full width. P "
    "marks projected text, S text and image in one shared stream. A hatched block starts "
    "untrained, cut from its teacher blocks."
)
"""How to read the picture."""

# Heights within one row, in CSS pixels downwards from its top.
NUMBERS, TEACHER, FAN, STUDENT, NAMES, ROW, BETWEEN = 14, 22, 54, 80, 156, 190, 22


def plan_drawing(plan: Plan, name: str, title: str) -> Drawing:
    """The picture with its words; `title` names the student, as in "the 50% student"."""
    return Drawing(
        name=name,
        alt=f"Plan of {title}: {in_words(plan)}.",
        caption=f"{title[0].upper()}{title[1:]}: {in_words(plan)}.",
        draw=lambda theme: plan_figure(plan, theme),
    )


def plan_png(plan: Plan) -> bytes:
    """The picture alone, in the light theme, as the model card shows it."""
    return png(plan_figure(plan, LIGHT))


def in_words(plan: Plan) -> str:
    """The plan in one sentence without its full stop, for alt texts, captions and cards."""
    merged = [span(*block.span) for block in plan.blocks if block.length > 1]
    cut = [f"{span(*b.span)} to {ffn(b.ffn)}" for b in plan.blocks if b.ffn != 1.0]
    texts = {
        text: [span(*b.span) for b in plan.blocks if b.text == text]
        for text in ("projected", "shared")
    }
    untrained = [b for b in plan.blocks if b.untrained]
    cut_from = {
        source: [span(*b.span) for b in untrained if b.length > 1 and b.start == start]
        for start, source in _SOURCE.items()
    }
    # Of one block all sources are that block.
    cut_alone = [span(*b.span) for b in untrained if b.length == 1]
    own = sum(block.untouched for block in plan.blocks)
    parts = [f"{plan.teacher_blocks} teacher blocks become {len(plan.blocks)}"]
    if merged:
        parts.append("merged are " + ", ".join(merged))
    if cut:
        parts.append("FFNs are narrowed in " + ", ".join(cut))
    parts += [f"text is {text} in {', '.join(found)}" for text, found in texts.items() if found]
    parts += [
        f"cut untrained from the {source} are {', '.join(found)}"
        for source, found in cut_from.items()
        if found
    ]
    if cut_alone:
        parts.append("cut untrained are " + ", ".join(cut_alone))
    blocks = "block is" if own == 1 else "blocks are"
    parts.append(f"{own or 'no'} {blocks} the teacher’s own")
    return "; ".join(parts)


def rows(plan: Plan, longest: int = LONGEST_ROW) -> list[list[BlockPlan]]:
    """The blocks in as few rows as fit `longest` teacher blocks, of about equal length."""
    count = -(-plan.teacher_blocks // longest)
    wanted = plan.teacher_blocks / count
    made: list[list[BlockPlan]] = [[]]
    for block in plan.blocks:
        middle = (block.span[0] + block.span[1] + 1) / 2
        if made[-1] and middle > wanted * len(made):
            made.append([])
        made[-1].append(block)
    return made


def plan_figure(plan: Plan, theme: Theme) -> Figure:
    """The plan in one theme."""
    lines = rows(plan)
    cells = max(line[-1].span[1] - line[0].span[0] + 1 for line in lines)
    cell = min(CELL, (WIDEST - MARGIN) / cells)
    width, height = round(MARGIN + cells * cell + 8), ROW * len(lines) - BETWEEN
    drawn = figure(width, height, theme)
    drawn.set_layout_engine("none")
    ax = drawn.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), frame_on=False)
    ax.set_axis_off()
    colours = _colours(plan, theme)
    for number, line in enumerate(lines):
        _row(ax, line, colours, theme, top=ROW * number, cell=cell)
    return drawn


def _colours(plan: Plan, theme: Theme) -> dict[tuple[int, int], str]:
    """Fill by span: grey for the teacher's own blocks, else colours in turn."""
    changed = [block.span for block in plan.blocks if not block.untouched]
    fills = {span: theme.spans[i % len(theme.spans)] for i, span in enumerate(changed)}
    return {block.span: fills.get(block.span, theme.neutral) for block in plan.blocks}


def _row(
    ax: Axes,
    line: Sequence[BlockPlan],
    colours: dict[tuple[int, int], str],
    theme: Theme,
    *,
    top: float,
    cell: float,
) -> None:
    from matplotlib.patches import Polygon

    gap = 1.5
    small = min(11.0, cell * 0.42) * POINTS
    origin = line[0].span[0]
    for words, y in (("teacher", (TEACHER + FAN) / 2), ("student", (STUDENT + NAMES) / 2)):
        ax.text(
            MARGIN - 16, top + y, words, ha="right", va="center",
            color=theme.muted, fontsize=13 * POINTS,
        )  # fmt: skip
    for block in line:
        first, last = block.span
        colour = colours[block.span]
        left, right = (MARGIN + (i - origin) * cell for i in (first, last + 1))
        middle = (left + right) / 2
        low, high = middle - cell / 2 + gap, middle + cell / 2 - gap
        for i in range(first, last + 1):
            x = MARGIN + (i - origin) * cell
            _cell(ax, x + gap, top + TEACHER, cell - 2 * gap, FAN - TEACHER, colour)
            ax.text(
                x + cell / 2, top + NUMBERS, str(i), ha="center", va="center",
                color=theme.muted, fontsize=small,
            )  # fmt: skip
        corners = [(left + gap, top + FAN), (right - gap, top + FAN)]
        corners += [(high, top + STUDENT), (low, top + STUDENT)]
        ax.add_patch(Polygon(corners, facecolor=colour, alpha=0.35, linewidth=0))
        full = NAMES - STUDENT - 10
        if block.ffn != 1.0:
            _cell(ax, low, top + STUDENT, high - low, full, "none", edge=theme.muted)
            ax.text(
                middle, top + STUDENT + full - 9, ffn(block.ffn, 2),
                ha="center", va="center", color=theme.muted,
                fontsize=min(10.0, cell * 0.36) * POINTS,
            )  # fmt: skip
        bar = full * max(block.kept, LINEAR)
        hatch = theme.surface if block.untrained else None
        _cell(ax, low, top + STUDENT, high - low, bar, colour, hatch=hatch)
        if block.text != "dual":
            ax.text(
                middle, top + STUDENT + bar / 2, block.text[0].upper(), ha="center", va="center",
                color=theme.ink, fontsize=small,
            )  # fmt: skip
        ax.text(
            middle, top + NAMES, span(first, last), ha="center", va="center",
            color=theme.ink, fontsize=small,
        )  # fmt: skip


def _cell(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    edge: str | None = None,
    hatch: str | None = None,
) -> None:
    from matplotlib.patches import Rectangle

    cell = Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge or hatch or "none")
    cell.set(hatch=HATCH if hatch else None)
    cell.set(linewidth=0.8 if edge else 0, linestyle=(0, (3, 2)))
    ax.add_patch(cell)
