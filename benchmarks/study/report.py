"""Writes the tables and the plot of docs/study.md from what the study left.

    python -m benchmarks.study.report build/study

Between the markers of docs/study.md everything is replaced; what stands outside them, what the
numbers say, is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.methods import ABLATIONS, CHAINS, METHODS, Method

Row = dict[str, Any]
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Student's t for a two-sided 95% interval, by the number of seeds."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("results", type=Path)
    arguments.add_argument("--document", type=Path, default=Path("docs/study.md"))
    options = arguments.parse_args()
    rows = [json.loads(f.read_text()) for f in sorted(options.results.glob("*.*.*.json"))]
    teacher = json.loads((options.results / "teacher.json").read_text())
    picture = options.document.with_name("study.png")
    plot(rows, teacher, picture)
    shown = f"![Judge score over fidelity loss]({picture.name})"
    made = "\n\n".join([*tables(rows, teacher), shown])
    text = options.document.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- results -->\n).*?(\n<!-- end of results -->)", re.DOTALL)
    options.document.write_text(pattern.sub(lambda m: m[1] + made + m[2], text), "utf-8")


def tables(rows: Sequence[Row], teacher: Row) -> list[str]:
    """The teacher in a line, a table of methods for each budget, and the ablations'."""
    judge = teacher["judge"]
    families = ", ".join(f"{name} {score:.2f}" for name, score in judge.items())
    found = [
        f"Teacher: {teacher['parameters']:,} parameters, judge {families}; diffusion loss "
        f"{teacher['diffusion']:.3f}, {teacher['latency_ms']:.1f} ms a pass."
    ]
    for budget in budgets_of(rows):
        here = [row for row in rows if row["budget"] == budget]
        found.append(f"### At {budget} of the parameters")
        found.append(main_table(METHODS, here))
        found.append(family_table(METHODS, here, list(judge)))
        ablated = [m for m in (*ABLATIONS, *CHAINS) if any(row["method"] == m.name for row in here)]
        if ablated:
            like = [m for m in METHODS if m.name in ("PPCL", "Amber")]
            found.append(f"### One part at a time, at {budget}")
            found.append(main_table([*like, *ablated], here))
    return found


def budgets_of(rows: Sequence[Row]) -> list[str]:
    """The largest first."""
    return sorted({row["budget"] for row in rows}, key=lambda b: -float(b.rstrip("%")))


def main_table(methods: Sequence[Method], rows: Sequence[Row]) -> str:
    """What it is, how near it is before and after recovery, and what it cost."""
    lines = [
        "| method | parameters | blocks | fidelity, assembled | fidelity, recovered "
        "| diffusion loss | judge | ms a pass | training, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in methods:
        mine = [row for row in rows if row["method"] == method.name]
        reached = [row for row in mine if row["reached"]]
        if not reached:
            lines.append(f"| {method.name} | does not reach it |" + " |" * 7)
            continue

        def column(key: str, digits: int, reached: Sequence[Row] = reached) -> str:
            return interval([row[key] for row in reached], digits)

        overall = interval([row["judge"]["overall"] for row in reached], 3)
        cost = statistics.mean(cost_of(row) for row in reached)
        parameters = statistics.mean(row["parameters"] for row in reached)
        blocks = statistics.mean(row["blocks"] for row in reached)
        lines.append(
            f"| {method.name} | {parameters:,.0f} | {blocks:.3g} | {column('fidelity_before', 3)} "
            f"| {column('fidelity', 4)} | {column('diffusion', 3)} | {overall} "
            f"| {statistics.median(row['latency_ms'] for row in reached):.1f} | {cost:.0f} |"
        )
    return "\n".join(lines)


def family_table(methods: Sequence[Method], rows: Sequence[Row], families: Sequence[str]) -> str:
    """Mean judge scores by family."""
    lines = ["| judge score | " + " | ".join(families) + " |", "|---|" + "---:|" * len(families)]
    for method in methods:
        mine = [row for row in rows if row["method"] == method.name and row["reached"]]
        if mine:
            means = [statistics.mean(row["judge"][name] for row in mine) for name in families]
            lines.append(f"| {method.name} | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    return "\n".join(lines)


def interval(values: Sequence[float], digits: int) -> str:
    """The mean, and half the width of its 95% interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def cost_of(row: Row) -> float:
    """Seconds of analysis, search, training before recovery, and recovery."""
    return float(row["analysis_s"] + row["search_s"] + row["library_s"] + row["recovery_s"])


def plot(rows: Sequence[Row], teacher: Row, file: Path) -> None:
    """Judge score over fidelity loss, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    budgets = budgets_of(rows)
    drawn, axes = pyplot.subplots(1, len(budgets), figsize=(11, 4.5), squeeze=False, sharey=True)
    colours = [f"C{i}" for i in range(10)]
    for ax, budget in zip(axes[0], budgets, strict=True):
        for method, colour in zip(METHODS, colours, strict=False):
            mine = [
                row
                for row in rows
                if (row["method"], row["budget"], row["reached"]) == (method.name, budget, True)
            ]
            # A ring shows where another method found the same student.
            ring = method.name == "Puzzle"
            ax.scatter(
                [row["fidelity"] for row in mine],
                [row["judge"]["overall"] for row in mine],
                edgecolor=colour,
                facecolor="none" if ring else colour,
                label=method.name,
                s=110 if ring else 28,
            )
        ax.axhline(teacher["judge"]["overall"], color="grey", linewidth=0.8, linestyle="--")
        ax.set(xscale="log", xlabel="fidelity loss after recovery", title=budget)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0][0].set_ylabel("judge score (dashed: teacher)")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn.savefig(file, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
