"""Budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from search.budget import (
    CURRENCIES,
    Budget,
    BudgetError,
    Currency,
    check_reachable,
    parse_budget,
)
from storage import layout
from storage.section import Section

TEACHER = 20_430_401_088


@pytest.mark.parametrize(
    ("written", "limit", "label"),
    [
        ("10B", 10_000_000_000, "10B"),
        ("600M", 600_000_000, "600M"),
        ("1.5b", 1_500_000_000, "1.5B"),
        ("1_234_567", 1_234_567, "1234567"),
        (10_000_000_000, 10_000_000_000, "10B"),
        ("0.5", TEACHER // 2, "50pct"),
        (0.5, TEACHER // 2, "50pct"),
        ("50%", TEACHER // 2, "50pct"),
        ("33.3%", int(0.333 * TEACHER), "33.3pct"),
        ("1e9", 1_000_000_000, "1B"),
        (1, TEACHER, "100pct"),
    ],
)
def test_reads_every_form(written: str | float, limit: int, label: str) -> None:
    budget = parse_budget(written)
    assert budget.limit(TEACHER) == limit
    assert budget.label == label
    assert parse_budget(budget.asked) == budget


@pytest.mark.parametrize(
    ("written", "currency", "limit", "label"),
    [
        ("12GiB", "memory", 12 * 2**30, "12GiB"),
        ("1.5 gib", "memory", 3 * 2**29, "1.5GiB"),
        ("700MiB", "memory", 700 * 2**20, "700MiB"),
        ("0.1MiB", "memory", 102 * 2**10, "102KiB"),
        ("60% memory", "memory", TEACHER * 6 // 10, "60pct-memory"),
        ("350ms", "latency", 350_000, "350ms"),
        ("0.35s", "latency", 350_000, "350ms"),
        ("1234567us", "latency", 1_234_567, "1234567us"),
        ("60% latency", "latency", TEACHER * 6 // 10, "60pct-latency"),
        ("60%Latency", "latency", TEACHER * 6 // 10, "60pct-latency"),
        ("60% parameters", "parameters", TEACHER * 6 // 10, "60pct"),
    ],
)
def test_reads_other_currencies(written: str, currency: str, limit: int, label: str) -> None:
    budget = parse_budget(written)
    assert (budget.currency, budget.limit(TEACHER), budget.label) == (currency, limit, label)
    assert parse_budget(budget.asked) == budget


@given(
    st.sampled_from(CURRENCIES),
    st.one_of(st.integers(1, 10**13), st.floats(0, 1, exclude_min=True).filter(lambda x: x > 1e-9)),
)
def test_what_is_written_is_read_again(currency: Currency, amount: float) -> None:
    if isinstance(amount, int):
        unit = {"parameters": "", "memory": "KiB", "latency": "us"}[currency]
        budget = parse_budget(f"{max(amount, 2)}{unit}")
    else:
        budget = parse_budget(f"{100 * amount:.12f}% {currency}")
    assert budget.currency == currency
    assert parse_budget(budget.asked) == budget
    assert budget.asked == Budget.model_validate(budget.model_dump(mode="json")).asked
    assert layout.best(budget.label) == f"best/{budget.label}"
    assert 0 <= budget.limit(TEACHER) <= max(TEACHER, budget.count or 0)


@given(st.integers(2, 10**12), st.integers(2, 10**12))
def test_labels_are_equal_exactly_for_equal_budgets(one: int, other: int) -> None:
    labels = {
        Budget(currency=c, count=n).label for c in ("parameters", "latency") for n in (one, other)
    }
    assert len(labels) == 2 * len({one, other})


@pytest.mark.parametrize(
    "written",
    [
        *(
            "",
            "ten",
            "-3",
            "0",
            "0%",
            "150%",
            "1.5",
            "10T",
            "nan",
            "1e400",
            True,
            "0ms",
            "0.2KiB",
            "3GB",
        ),
        *("60% speed", "0.5 latency", "60% ms", "50%B", "% latency"),
    ],
)
def test_refuses_what_is_no_size(written: str | float) -> None:
    with pytest.raises(BudgetError, match="not a size"):
        parse_budget(written)


def test_is_a_config_field_in_its_written_form() -> None:
    class Wanted(Section):
        budgets: tuple[Budget, ...]

    wanted = Wanted.model_validate({"budgets": ["10B", 0.5]})
    assert [budget.label for budget in wanted.budgets] == ["10B", "50pct"]
    assert wanted.model_dump(mode="json") == {"budgets": ["10B", "50%"]}
    with pytest.raises(ValidationError) as error:
        Wanted.model_validate({"budgets": ["10B", "huge"]})
    assert error.value.errors()[0]["loc"][:2] == ("budgets", 1)


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    with pytest.raises(BudgetError, match="6,000,000,000"):
        check_reachable(parse_budget("2B"), TEACHER, 6_000_000_000)
    with pytest.raises(BudgetError, match="more than the teacher"):
        check_reachable(parse_budget("30B"), TEACHER, 6_000_000_000)
    assert check_reachable(parse_budget("10B"), TEACHER, 6_000_000_000) == 10_000_000_000


def test_what_is_reachable_is_said_in_the_unit_of_the_budget() -> None:
    with pytest.raises(BudgetError, match=r"200,000 µs .* has 250,001 \(50\.0%"):
        check_reachable(parse_budget("200ms"), 500_000, 250_001)
    with pytest.raises(BudgetError, match=r"has 3,000 \(60\.0%"):
        check_reachable(parse_budget("50% memory"), 5_000, 3_000)
