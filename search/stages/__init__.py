"""The stages of a sweep, in the order in which they run."""

from __future__ import annotations

from search.stages.analyse import ANALYSE
from search.stages.encode import ENCODE
from search.stages.library import LIBRARY
from search.stages.measure import MEASURE
from search.stages.publish import PUBLISH
from search.stages.recover import RECOVER
from search.stages.report import REPORT
from search.stages.search import SEARCH
from search.stages.stage import Stage, require_earlier, run_stage, skip_stage
from search.sweep import Sweep

__all__ = [
    "STAGES",
    "Stage",
    "require_earlier",
    "run_stage",
    "skip_stage",
    "stage_named",
    "stages_of",
]

STAGES: tuple[Stage, ...] = (ENCODE, MEASURE, ANALYSE, LIBRARY, SEARCH, RECOVER, PUBLISH, REPORT)


def stages_of(sweep: Sweep) -> tuple[Stage, ...]:
    """Those that this sweep needs."""
    return tuple(stage for stage in STAGES if stage.wanted(sweep))


def stage_named(name: str) -> Stage:
    """One of STAGES."""
    return next(stage for stage in STAGES if stage.name == name)
