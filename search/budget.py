"""Wanted sizes: parameters (`10B`, `600M`), peak memory (`12GiB`), latency (`350ms`), or a part of
the teacher's (`50%`, `60% memory`, `60% latency`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import model_serializer, model_validator

from storage.errors import EspalierError
from storage.section import Section

Currency = Literal["parameters", "memory", "latency"]
"""What a budget is counted in, always in whole numbers: parameters, bytes, microseconds."""

CURRENCIES: tuple[Currency, ...] = get_args(Currency)

WHOLE_UNITS: dict[Currency, str] = {
    "parameters": "parameters",
    "memory": "bytes of peak memory",
    "latency": "µs of latency",
}

# Largest first: the shortest written form has the largest unit.
_UNITS: dict[Currency, dict[str, int]] = {
    "parameters": {"B": 10**9, "M": 10**6, "K": 10**3, "": 1},
    "memory": {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10},
    "latency": {"s": 10**6, "ms": 10**3, "us": 1},
}
_OF_UNIT = {
    unit.upper(): (currency, size)
    for currency, units in _UNITS.items()
    for unit, size in units.items()
}
_LEAST = {currency: min(units.values()) for currency, units in _UNITS.items()}
_WRITTEN = re.compile(
    r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(%?)\s*([a-z]*)", re.IGNORECASE | re.ASCII
)


class BudgetError(EspalierError):
    """A size that is no size, or that no plan reaches."""


class Budget(Section):
    """What a student may cost at most, in one currency.

    Parameters are written as `10B`, `600M` or a count; the peak memory of a forward pass as `12GiB`
    (or MiB, KiB); its latency as `350ms` (or s, us); a part of the teacher's as `0.5` or `50%` of
    its parameters, `60% memory` or `60% latency`. That form is also what it is validated from and
    dumped to.
    """

    currency: Currency = "parameters"
    """What is counted."""
    count: int | None = None
    """In the whole unit of the currency (parameters, bytes, microseconds); null when a fraction is
    given."""
    fraction: float | None = None
    """Part of what the teacher costs, in (0, 1]; null when a count is given."""

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

    def limit(self, teacher: int) -> int:
        """The most that a student may cost, where the teacher costs `teacher`."""
        if self.count is not None:
            return self.count
        assert self.fraction is not None
        return math.floor(self.fraction * teacher)

    @property
    def asked(self) -> str:
        """The shortest written form: `10B`, `1.5GiB`, `350ms`, `50%`, `60% latency`."""
        if self.fraction is not None:
            of = "" if self.currency == "parameters" else f" {self.currency}"
            return f"{100 * self.fraction:.10g}%{of}"
        assert self.count is not None
        for unit, size in _UNITS[self.currency].items():
            scaled = f"{self.count / size:.10g}"
            whole = round(float(scaled) * size) == self.count
            if self.count >= size and len(scaled) <= 5 and "e" not in scaled and whole:
                return f"{scaled}{unit}"
        return f"{self.count // size}{unit}"

    @property
    def label(self) -> str:
        """Names folders and columns: `10B`, `50pct`, `60pct-latency`. Equal for equal budgets."""
        return self.asked.replace("% ", "pct-").replace("%", "pct")


@dataclass(frozen=True)
class Target:
    """A budget as a search meets it."""

    label: str
    limit: int
    """What a student may cost, in the whole unit of the currency."""
    currency: Currency = "parameters"
    margin: float = 0.0
    """Part of the limit that proposals leave free, see trainers.measure.MeasureConfig."""

    @property
    def room(self) -> int:
        """What a plan may be predicted to cost."""
        # A little more, so that a whole number stays what it is.
        return math.floor((1 - self.margin) * self.limit + 1e-6)

    def over(self, cost: int) -> float:
        """By which part of the limit a cost exceeds it; negative below."""
        return cost / self.limit - 1


def parse_budget(written: str | float) -> Budget:
    """A budget from its written form. BudgetError when it is none."""
    try:
        return Budget(**_parsed(str(written)))
    except ValueError as error:
        raise BudgetError(f"budget {error}") from None


def check_reachable(budget: Budget, teacher: int, smallest: int) -> int:
    """The budget's limit; BudgetError unless a plan that costs `smallest` fits under it and the
    teacher, which costs `teacher`, does not lie below it."""
    limit, unit = budget.limit(teacher), WHOLE_UNITS[budget.currency]
    if limit < smallest:
        raise BudgetError(
            f"budget {budget.asked} allows {limit:,} {unit}, but the smallest reachable "
            f"student has {smallest:,} ({smallest / teacher:.1%} of the teacher); ask "
            "for more, or allow longer spans (library.max_span) or narrower blocks "
            "(library.widths, library.texts)"
        )
    if limit > teacher:
        raise BudgetError(
            f"budget {budget.asked} allows {limit:,} {unit}, more than the teacher's "
            f"{teacher:,}; ask for less"
        )
    return limit


def _parsed(written: str) -> dict[str, Any]:
    match = _WRITTEN.fullmatch(written.strip().replace("_", "").replace(",", ""))
    number, percent, word = (float(match[1]), match[2], match[3]) if match else (0.0, "", "-")
    currency = word.lower() or "parameters"
    # Ten digits are what `asked` can say.
    fraction = round(number / 100 if percent else number, 10)
    if (percent or not word) and currency in CURRENCIES and 0 < fraction <= 1:
        return {"currency": currency, "fraction": fraction}
    if not percent and word.upper() in _OF_UNIT and math.isfinite(number):
        currency, size = _OF_UNIT[word.upper()]
        least = _LEAST[currency]
        count = round(number * size / least) * least
        if count >= 1 and (word or number == count):
            return {"currency": currency, "count": count}
    raise ValueError(
        f"{written!r}: not a size; write a number of parameters (10B, 600M), peak memory (12GiB), "
        "latency (350ms), or a part of the teacher's above 0 and up to 100% (0.5, 50%, 60% memory, "
        "60% latency)"
    )
