"""Wanted sizes: `10B`, `600M`, a plain count, or a fraction of the teacher as `0.5` or `50%`."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import model_serializer, model_validator

from storage.errors import EspalierError
from storage.section import Section

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_WRITTEN = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?|\.\d+)\s*([KkMmBb%]?)")


class BudgetError(EspalierError):
    """A size that is no size, or that no plan reaches."""


class Budget(Section):
    """The parameters that a student may have at most.

    Written as `10B`, `600M`, a count, or a fraction of the teacher (`0.5`, `50%`); that form is
    also what it is validated from and dumped to.
    """

    count: int | None = None
    """Parameters; null when a fraction is given."""
    fraction: float | None = None
    """Part of the teacher's parameters, in (0, 1]; null when a count is given."""

    @model_validator(mode="before")
    @classmethod
    def _from_written_form(cls, value: Any) -> Any:
        # ValueError, not BudgetError: inside a config the error then names the field.
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return _parsed(str(value))
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> Budget:
        if (self.count is None) == (self.fraction is None):
            raise ValueError("a budget is a count or a fraction, one of them")
        return self

    @model_serializer
    def _written(self) -> str:
        return self.asked

    def limit(self, teacher_parameters: int) -> int:
        """The most parameters a student of this teacher may have."""
        if self.count is not None:
            return self.count
        assert self.fraction is not None
        return math.floor(self.fraction * teacher_parameters)

    @property
    def asked(self) -> str:
        """The shortest written form: `10B`, `1.5M`, `50%`."""
        if self.fraction is not None:
            return f"{100 * self.fraction:.10g}%"
        assert self.count is not None
        for letter in ("B", "M", "K"):
            scaled = f"{self.count / _UNITS[letter]:.10g}"
            if self.count >= _UNITS[letter] and len(scaled) <= 5:
                return f"{scaled}{letter}"
        return str(self.count)

    @property
    def label(self) -> str:
        """Names folders and columns: `10B`, `50pct`. Equal for equal budgets."""
        return self.asked.replace("%", "pct")


def parse_budget(written: str | float) -> Budget:
    """A budget from its written form. BudgetError when it is none."""
    try:
        return Budget(**_parsed(str(written)))
    except ValueError as error:
        raise BudgetError(f"budget {error}") from None


def check_reachable(budget: Budget, teacher_parameters: int, smallest: int) -> int:
    """The budget's limit; BudgetError unless a plan of `smallest` parameters fits under it."""
    limit = budget.limit(teacher_parameters)
    if limit < smallest:
        raise BudgetError(
            f"budget {budget.asked} allows {limit:,} parameters, but the smallest reachable "
            f"student has {smallest:,} ({smallest / teacher_parameters:.1%} of the teacher); ask "
            "for more, or allow longer spans (library.max_span) or narrower blocks "
            "(library.widths, library.texts)"
        )
    if limit > teacher_parameters:
        raise BudgetError(
            f"budget {budget.asked} allows {limit:,} parameters, more than the teacher's "
            f"{teacher_parameters:,}; ask for less"
        )
    return limit


def _parsed(written: str) -> dict[str, int | float]:
    match = _WRITTEN.fullmatch(written.strip().replace("_", "").replace(",", ""))
    if match:
        number, unit = float(match[1]), match[2].upper()
        fraction = number / 100 if unit == "%" else number
        if (unit == "%" or not unit) and 0 < fraction <= 1:
            return {"fraction": fraction}
        count = round(number * _UNITS.get(unit, 0))
        if count >= 1 and unit != "%" and (unit or number == count):
            return {"count": count}
    raise ValueError(
        f"{written!r}: not a size; write a number of parameters (10B, 600M) or a part of the "
        "teacher above 0 and up to 1 (0.5, 50%)"
    )
