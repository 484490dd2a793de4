from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import binomtest

from storage import layout, registry
from storage.digest import digest_json
from storage.manifest import publish, published, read_bytes, verify
from storage.registry import Entry, add, assured, best, entries, keep_best, remove, show_best
from storage.store import open_store

START = datetime(2026, 9, 1, tzinfo=UTC)


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(
        str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_url")
    )


def entry(
    name, loss, score=None, *, judged=0, budget="10B", teacher="t", minutes=0, parameters=100
):
    return Entry(
        budget=budget,
        plan_digest=name,
        teacher=teacher,
        sweep="first",
        prefix=f"best/{budget}",
        parameters=parameters,
        fidelity_loss=loss,
        judge_score=score,
        judged=judged,
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


def test_few_pictures_beat_many_only_where_they_make_sure_of_it(store):
    assert winner(store, entry("a", 0.3, 0.9, judged=480), entry("b", 0.1, 1.0, judged=6)) == "a"
    assert winner(store, entry("c", 0.3, 1.0, judged=60)) == "c"


@given(st.integers(1, 10_000), st.data())
def test_what_is_assured_is_the_lower_end_of_wilsons_interval(pictures, data):
    passed = data.draw(st.integers(0, pictures))
    wilson = binomtest(passed, pictures).proportion_ci(0.95, method="wilson").low
    assert assured(passed / pictures, pictures) == pytest.approx(wilson, abs=1e-4)
    if passed < pictures:
        assert assured((passed + 1) / pictures, pictures) > assured(passed / pictures, pictures)


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


def models(store, *losses: float) -> list[Entry]:
    """Published models of 10B, each of one file that says which it is."""
    made = []
    for number, loss in enumerate(losses):
        prefix = layout.model("10B", str(number))
        publish(store, prefix, {"model_index.json": str(number).encode()}, {"number": number})
        made.append(entry(str(number), loss).model_copy(update={"model": prefix}))
        add(store, made[-1])
    return made


def shown(store) -> str | None:
    manifest = published(store, layout.best("10B"))
    if manifest is None:
        return None
    return read_bytes(store, layout.best("10B"), "model_index.json", manifest).decode()


def test_the_address_of_a_budget_holds_its_best_model(store):
    assert show_best(store, "10B") is None
    worse, better = models(store, 0.2, 0.1)
    assert show_best(store, "10B") == better.model
    assert shown(store) == "1"
    remove(store, better)
    assert show_best(store, "10B") == worse.model
    assert shown(store) == "0"
    remove(store, worse)
    assert show_best(store, "10B") is None
    assert list(store.keys(layout.best("10B"))) == []


def test_a_copy_of_the_best_that_another_spoiled_is_mended(store, monkeypatch):
    better = models(store, 0.2, 0.1)[1]
    real = registry.publish

    def meddled(store, prefix, *rest):
        """Another process shows its own model between our files and our look at them."""
        monkeypatch.setattr(registry, "publish", real)
        made = real(store, prefix, *rest)
        store.write(f"{prefix}/model_index.json", b"of another")
        return made

    monkeypatch.setattr(registry, "publish", meddled)
    assert show_best(store, "10B") == better.model
    assert shown(store) == "1"


def test_a_copy_of_the_best_is_replaced_only_where_models_differ(store, monkeypatch):
    def add_model(name, loss):
        prefix = layout.model("10B", name)
        publish(store, prefix, {"vae/w": b"same", "transformer/w": name.encode(), name: b"own"})
        add(store, entry(name, loss).model_copy(update={"model": prefix}))

    add_model("a", 0.2)
    show_best(store, "10B")
    add_model("b", 0.1)
    written, real = [], store.write
    monkeypatch.setattr(store, "write", lambda key, body: (written.append(key), real(key, body)))
    show_best(store, "10B")
    names = ("b", "manifest.json", "transformer/w")
    assert sorted(written) == [f"best/10B/{name}" for name in names]
    assert verify(store, "best/10B").files.keys() == {"b", "transformer/w", "vae/w"}
    assert set(store.keys("best")) == {f"best/10B/{name}" for name in (*names, "vae/w")}


def test_a_copy_of_the_best_that_was_cut_off_is_made_whole(store, monkeypatch):
    models(store, 0.2)
    show_best(store, "10B")
    better = models(store, 0.3, 0.1)[1]
    real = store.write

    def cut_off(key, body):
        real(key, body)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            show_best(store, "10B")
    assert shown(store) is None
    assert show_best(store, "10B") == better.model
    assert shown(store) == "1"
    verify(store, layout.best("10B"))


def test_the_best_models_are_kept(store):
    made = [
        entry(name, loss, minutes=i, teacher=teacher).model_copy(
            update={"model": f"best/10B/{name}"}
        )
        for i, (name, loss, teacher) in enumerate(
            [("a", 0.2, "t"), ("b", 0.1, "t"), ("c", 0.3, "t"), ("d", 0.9, "other")]
        )
    ]
    for one in made:
        publish(store, one.model, {"w": b"1"})
        add(store, one)
    assert keep_best(store, "10B", "t", 2, made=made[2].model) == []
    assert keep_best(store, "10B", "t", 2) == [made[2]]
    assert entries(store) == [made[0], made[1], made[3]]
    assert {key.split("/")[2] for key in store.keys("best")} == {"a", "b", "d"}
    with pytest.raises(ValueError, match="at least 1"):
        keep_best(store, "10B", "t", 0)


def test_entries_of_the_first_version_stay_readable(store):
    old = entry("a", 0.1).model_dump(mode="json", exclude={"model"})
    store.write(f"registry/10B/20260901T000000Z-{digest_json(old)}.json", json.dumps(old).encode())
    assert [one.model for one in entries(store)] == [None]


def test_entries_from_before_pictures_were_counted_are_ranked_and_removed(store):
    made = [entry(name, 0.1, score) for name, score in (("old", 0.95), ("worse", 0.5))]
    for one in made:
        old = one.model_copy(update={"model": f"best/10B/{one.plan_digest}"})
        content = old.model_dump(mode="json", exclude={"judged"})
        publish(store, old.model, {"w": b"1"})
        key = f"registry/10B/20260901T000000Z-{digest_json(content)}.json"
        store.write(key, json.dumps(content).encode())
    add(store, entry("new", 0.1, 0.9, judged=480))
    assert winner(store) == "old"
    assert [one.plan_digest for one in keep_best(store, "10B", "t", 2)] == ["worse"]
    assert {one.plan_digest for one in entries(store)} == {"old", "new"}
    assert {key.split("/")[2] for key in store.keys("best")} == {"old"}


PUBLISHER = """
import sys
from storage.manifest import publish
from storage.registry import Entry, add
from storage.store import open_store
store, who = open_store(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    model = f"best/10B/{who}-{i}"
    publish(store, model, {"w": who.encode() * 1000})
    add(store, Entry(budget="10B", plan_digest=f"{who}-{i}", teacher="t", sweep=who, prefix="s",
                     model=model, parameters=1, fidelity_loss=1 / (1 + i)))
"""


def test_sweeps_that_publish_at_once_lose_nothing(store):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, store.url, who],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in ("one", "two", "three")
    ]  # fmt: skip
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=120)
        assert process.returncode == 0
    found = entries(store)
    assert len(found) == 60
    assert all(verify(store, one.model).files["w"].size == len(one.sweep) * 1000 for one in found)
    leader = best(store, "10B")
    assert leader.fidelity_loss == 1 / 20


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content.replace(b"0.3", b"0.1"), "another digest"),
        (lambda content: content[:-1], "not a registry entry"),
    ],
)
def test_a_damaged_entry_is_passed_over_with_a_warning(store, caplog, damage, words):
    key = add(store, entry("altered", 0.3))
    with store.read(key) as stream:
        content = damage(stream.read())
    store.write(key, content)
    assert winner(store, entry("whole", 0.2)) == "whole"
    assert [one.plan_digest for one in entries(store)] == ["whole"]
    assert f"{key}: " in caplog.text
    assert words in caplog.text
