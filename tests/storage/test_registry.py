from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from storage.errors import DamagedError
from storage.registry import Entry, add, best, entries
from storage.store import open_store

START = datetime(2026, 9, 1, tzinfo=UTC)


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(
        str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_url")
    )


def entry(name, loss, score=None, *, budget="10B", teacher="t", minutes=0, parameters=100):
    return Entry(
        budget=budget,
        plan_digest=name,
        teacher=teacher,
        sweep="first",
        prefix=f"best/{budget}",
        parameters=parameters,
        fidelity_loss=loss,
        judge_score=score,
        created=START + timedelta(minutes=minutes),
    )


def winner(store, *candidates, **where):
    for candidate in candidates:
        add(store, candidate)
    found = best(store, "10B", **where)
    return found.plan_digest if found else None


def test_an_empty_registry_has_no_best(store):
    assert winner(store) is None
    assert entries(store) == []


def test_entries_are_kept_in_order_and_once(store):
    made = [entry("c", 3.0, minutes=2), entry("a", 1.0, minutes=1, budget="50pct")]
    keys = [add(store, one) for one in made]
    assert add(store, made[0]) == keys[0]
    assert keys[0].startswith("registry/10B/20260901T000200Z-")
    assert entries(store) == [made[1], made[0]]
    assert entries(store, "10B") == [made[0]]


def test_two_models_of_one_moment_are_both_kept(store):
    add(store, entry("a", 1.0))
    add(store, entry("b", 1.0))
    assert len(entries(store)) == 2


def test_unjudged_the_lowest_loss_wins(store):
    assert winner(store, entry("a", 0.3), entry("b", 0.1), entry("c", 0.2)) == "b"


def test_judged_the_highest_score_wins(store):
    assert winner(store, entry("a", 0.1, 0.80), entry("b", 0.3, 0.90)) == "b"


def test_equal_scores_are_told_apart_by_loss_then_size_then_age(store):
    assert winner(store, entry("a", 0.3, 0.9), entry("b", 0.1, 0.9, minutes=1)) == "b"
    assert winner(store, entry("c", 0.1, 0.9, minutes=2, parameters=99)) == "c"
    assert winner(store, entry("d", 0.1, 0.9, minutes=3, parameters=99)) == "c"


def test_a_judged_entry_comes_before_an_unjudged_one(store):
    assert winner(store, entry("a", 0.01), entry("b", 0.5, 0.0)) == "b"


def test_only_one_teachers_models_compare(store):
    candidates = [entry("a", 0.1, teacher="other"), entry("b", 0.2)]
    assert winner(store, *candidates, teacher="t") == "b"


def test_nan_is_no_loss():
    with pytest.raises(ValidationError, match="finite"):
        entry("a", float("nan"))


def test_a_damaged_entry_is_named(store):
    store.write("registry/10B/x.json", b"{}")
    with pytest.raises(DamagedError, match=r"registry/10B/x.json: not a registry entry"):
        entries(store)
