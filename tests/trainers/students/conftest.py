"""Tests that take `tiny` state what every family must do."""

from __future__ import annotations

import pytest

from tests.trainers.students.tiny import FAMILY_TEACHERS, Tiny


@pytest.fixture(scope="module", params=FAMILY_TEACHERS, ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """The tiny teacher of each family in turn."""
    return request.param
