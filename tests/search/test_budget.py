"""Budgets as people write them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from search.budget import Budget, BudgetError, check_reachable, parse_budget
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


@pytest.mark.parametrize("written", ["", "ten", "-3", "0", "0%", "150%", "1.5", "10T", "nan", True])
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
