"""What a search may seek to lower, or raise, and which tier of it measures what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from search.budget import CURRENCIES, Currency

Scored = Literal["fidelity_loss", "parameters", "memory", "latency"]
"""What every scored plan has; all are minimised."""

Objective = Literal["judge_score", "fidelity_loss", "parameters", "memory", "latency"]
"""The judge's score, which is maximised, is known of recovered finalists only."""

DEFAULT: tuple[Scored, ...] = ("fidelity_loss", "parameters")


def checked(objectives: tuple[Objective, ...] | None) -> tuple[Objective, ...] | None:
    """The objectives themselves; ValueError when no search can go by them."""
    if objectives is None:
        return None
    for objective in objectives:
        if objectives.count(objective) > 1:
            raise ValueError(f"{objective} is named twice; remove one")
    if "fidelity_loss" not in objectives:
        raise ValueError(
            "fidelity_loss is missing, and it is all that scored plans are told apart by; add it"
        )
    return objectives


def scored(objectives: Sequence[Objective] | None) -> tuple[Scored, ...]:
    """Those that plans are scored by."""
    chosen = DEFAULT if objectives is None else objectives
    return tuple(o for o in chosen if o != "judge_score")


def judge_decides(objectives: Sequence[Objective] | None) -> bool:
    """Whether a better judge's score comes before a lower fidelity loss among recovered finalists:
    the one that is named first does."""
    if objectives is None:
        return True
    order = [o for o in objectives if o in ("judge_score", "fidelity_loss")]
    return order[0] == "judge_score"


def measured(objectives: Sequence[Objective] | None) -> set[Currency]:
    """The currencies among them that a device must measure."""
    return {c for c in CURRENCIES if c != "parameters" and c in (objectives or ())}
