"""Schedules: what a phase may combine, and what a search may choose."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainers.schedule import Phase, PhaseSpace, Schedule, ScheduleSpace


def test_steps_must_be_positive() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Phase(loss="span", steps=0, lr=1e-3)


def test_span_loss_with_all_blocks_is_refused() -> None:
    with pytest.raises(ValidationError, match="only reaches replacements"):
        Phase(loss="span", train="all", steps=1, lr=1e-3)


def test_a_schedule_has_a_phase() -> None:
    with pytest.raises(ValidationError):
        Schedule(phases=())


def test_one_number_fixes_a_range() -> None:
    space = PhaseSpace.model_validate({"loss": "span", "steps": 30, "lr": [1e-4, 1e-3]})
    assert space.steps == (30, 30)
    assert space.lr == (1e-4, 1e-3)


def test_a_reversed_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="reversed"):
        PhaseSpace(loss="span", steps=(30, 20), lr=(1e-3, 1e-3))


def test_the_middle_lies_within_every_range() -> None:
    space = ScheduleSpace(
        phases=(
            PhaseSpace(loss="span", steps=(40, 160), lr=(1e-4, 1e-2)),
            PhaseSpace(loss="velocity", train="all", steps=(7, 7), lr=(3e-4, 3e-4), clip=2.0),
        )
    )
    assert not space.fixed
    assert ScheduleSpace(phases=space.phases[1:]).fixed
    schedule = space.schedule(space.middle())
    assert schedule.steps == 80 + 7
    assert schedule.phases[0].lr == pytest.approx(1e-3)
    assert schedule.phases[1] == Phase(loss="velocity", train="all", steps=7, lr=3e-4, clip=2.0)


def test_a_schedule_survives_json() -> None:
    space = ScheduleSpace()
    schedule = space.schedule(space.middle())
    assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule
