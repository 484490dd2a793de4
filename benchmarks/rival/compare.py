"""Two searches' costs side by side, and the picture of them. Plain values, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Reached(NamedTuple):
    """What a search had to show for its cost."""

    cpu: float
    fidelity: float
    judge: float


def rival_at(rival: Mapping[str, Any], trials: int) -> tuple[float, Reached | None]:
    """What the first so many trials cost in all, and the best student that came to its end."""
    first = [marks for marks in rival["trials"] if marks and marks[0]["order"] < trials]
    cost = sum(marks[-1]["cpu"] for marks in first)
    ended = [marks[-1] for marks in first if marks[-1]["steps"] == rival["steps"]]
    if not ended:
        return cost, None
    best = min(ended, key=lambda mark: mark["fidelity"])
    return cost, Reached(cost, best["fidelity"], best["judge"])


def ours_at(ours: Mapping[str, Any], trials: int) -> list[Reached]:
    """What we have after so many trials: their best as assembled, along its recovery."""
    scored = ours["trials"][min(trials, len(ours["trials"])) - 1]
    before = ours["analysis_cpu"] + ours["library_cpu"] + scored["cpu"]
    return [
        Reached(before + mark["cpu"], mark["fidelity"], mark["judge"])
        for mark in ours["recoveries"][scored["plan"]]
    ]


def cheapest(ours: Sequence[Reached], fidelity: float, judge: float) -> Reached | None:
    """The first of ours that is as good in both."""
    good = [r for r in ours if r.fidelity <= fidelity and r.judge >= judge]
    return min(good, default=None)


def compare(ours: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any]:
    """By number of trials: both costs, both qualities, and how many times cheaper we are.

    `to_reach`: at the quality that the rival has by then, how many times more it has cost than the
    cheapest of our students that is as good. `in_all`: all that either search did, with a whole
    recovery of ours.
    """
    rows = []
    total = len(rival["trials"])
    for trials in sorted({*range(5, total, 5), total}):
        cost, best = rival_at(rival, trials)
        mine = ours_at(ours, trials)
        equal = cheapest(mine, best.fidelity, best.judge) if best else None
        rows.append(
            {
                "trials": trials,
                "rival": None if best is None else best._asdict(),
                "rival_cpu": cost,
                "ours": mine[-1]._asdict(),
                "to_reach": cost / equal.cpu if equal else None,
                "in_all": cost / mine[-1].cpu,
            }
        )
    return {"steps": rival["steps"], "wall_s": rival["wall_s"], "rows": rows}


def draw(
    ours: Sequence[Mapping[str, Any]],
    rival: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    out: Path,
) -> None:
    """Fidelity loss and judge score over cost, and the ratio of costs over trials; a line for each
    of our searches, which `found` holds against the rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (loss, judge, ratio) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for number, search in enumerate(ours):
        mine = ours_at(search, len(search["trials"]))
        cost = [r.cpu for r in mine]
        label = None if number else "Espalier, a line a seed"
        loss.plot(cost, [r.fidelity for r in mine], "C0o-", label=label, ms=3, lw=1)
        judge.plot(cost, [r.judge for r in mine], "C0o-", ms=3, lw=1)
    best = [row["rival"] for row in found[0]["rows"] if row["rival"]]
    name = f"TPE + ASHA, {rival['steps']} steps"
    cost = [b["cpu"] for b in best]
    loss.step(cost, [b["fidelity"] for b in best], "C1", where="post", label=name)
    judge.step(cost, [b["judge"] for b in best], "C1", where="post")
    for number, rows in enumerate(found):
        reach = [(row["trials"], row["to_reach"]) for row in rows["rows"] if row["to_reach"]]
        whole = [(row["trials"], row["in_all"]) for row in rows["rows"]]
        labels = (None, None) if number else ("to its quality", "all of both")
        ratio.plot(
            [t for t, _ in reach], [r for _, r in reach], "C0o-", ms=3, lw=1, label=labels[0]
        )
        ratio.plot(*zip(*whole, strict=True), "C0--", lw=1, label=labels[1])
    for ax, title in ((loss, "fidelity loss"), (judge, "judge score")):
        ax.set(xscale="log", xlabel="training and scoring, seconds of one core", title=title)
    loss.set_yscale("log")
    for axis in (loss.xaxis, judge.xaxis, loss.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    loss.legend(fontsize=7)
    ratio.set(xlabel="trials", title="rival's cost / ours")
    ratio.axhline(20, color="grey", lw=0.8)
    ratio.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
