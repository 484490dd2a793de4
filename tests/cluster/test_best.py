"""`espalier best` on a folder and on a real S3 server: what was published, by rank."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from storage import layout, registry
from storage.manifest import publish, published
from storage.registry import Entry, add, entries
from storage.store import Store, open_store
from trainers.students.counts import plan_parameters
from trainers.students.plan import identity_plan
from trainers.teacher import open_teacher

BEST = layout.model("50pct", "bbbb")
START = datetime(2026, 9, 1, tzinfo=UTC)


def espalier(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["best", *(str(argument) for argument in arguments)])


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "runs") if request.param == "folder" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def store(url: str, tiny_pipeline: Path) -> Store:
    """Two models at 50pct, the better of which is a whole one, and one at 10B."""
    store = open_store(url)
    for minutes, (budget, plan, score) in enumerate(
        [("50pct", "aaaa", 0.5), ("50pct", "bbbb", 0.9), ("10B", "cccc", None)]
    ):
        entry = Entry(
            budget=budget, plan_digest=plan, teacher="t", sweep="one", prefix=f"students/{plan}",
            model=layout.model(budget, plan), parameters=100, fidelity_loss=0.25, judge_score=score,
            judged=480 if score else 0, created=START + timedelta(minutes=minutes),
        )  # fmt: skip
        add(store, entry)
    files = {
        file.relative_to(tiny_pipeline).as_posix(): file
        for file in tiny_pipeline.rglob("*")
        if file.is_file()
    }
    publish(store, layout.model("50pct", "aaaa"), {"model_index.json": b"{}"})
    publish(store, BEST, files)
    return store


def test_lists_the_best_of_each_budget_first(store: Store) -> None:
    shown = espalier("ls", "--storage", store.url)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["10B", "50pct", "50pct"]
    assert "judge 0.900 (480 pictures)  plan bbbb  sweep one" in shown.stdout.splitlines()[1]
    read = json.loads(espalier("ls", "--storage", store.url, "--json").stdout)
    assert [entry["plan_digest"] for entry in read] == ["cccc", "bbbb", "aaaa"]


def test_an_empty_storage_says_so(tmp_path: Path) -> None:
    shown = espalier("ls", "--storage", tmp_path)
    assert shown.exit_code == 0
    assert "nothing is published" in shown.stdout


def test_fetches_and_verifies(store: Store, tiny_pipeline: Path, tmp_path: Path) -> None:
    assert (
        espalier("get", "50pct", "--out", tmp_path / "half", "--storage", store.url).exit_code == 0
    )
    assert (tmp_path / "half" / "model_index.json").read_bytes() == (
        tiny_pipeline / "model_index.json"
    ).read_bytes()
    teacher = open_teacher(tiny_pipeline)
    whole = plan_parameters(identity_plan("qwen_image", 6), teacher.config)
    shown = espalier("verify", "50pct", "--storage", store.url)
    assert f"loads with {whole:,} parameters" in shown.stdout


def test_a_folder_with_another_models_files_is_left_alone(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "half"
    index = out / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    refused = espalier("get", "50pct", "--out", out, "--storage", store.url)
    assert refused.exit_code == 1
    assert "holds transformer/diffusion_pytorch_model.safetensors.index.json" in refused.stderr
    assert [file for file in out.rglob("*") if file.is_file()] == [index]
    index.unlink()
    for _ in range(2):  # its own files may be there already
        assert espalier("get", "50pct", "--out", out, "--storage", store.url).exit_code == 0


def test_an_altered_file_is_named(store: Store, tmp_path: Path) -> None:
    key = f"{BEST}/model_index.json"
    store.write(key, b"{}")
    for command in (("verify",), ("get", "--out", tmp_path / "out")):
        shown = espalier(*command, "50pct", "--storage", store.url)
        assert shown.exit_code == 1
        assert f"{key}: 2 bytes, but" in shown.stderr


def test_a_damaged_entry_is_passed_over_and_fails_the_check(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = next(iter(store.keys(layout.registered("50pct"))))
    store.write(key, b"{}")
    shown = espalier("ls", "--storage", store.url)
    assert len(shown.stdout.splitlines()) == 2
    assert f"{key}: not a registry entry" in caplog.text
    fetched = espalier("get", "50pct", "--out", tmp_path / "out", "--storage", store.url)
    assert fetched.exit_code == 0
    checked = espalier("verify", "50pct", "--storage", store.url)
    assert checked.exit_code == 1
    assert "as published" in checked.stdout
    assert f"{key}: not a registry entry" in checked.stderr


def test_a_budget_without_a_model_is_told_what_there_is(store: Store, tmp_path: Path) -> None:
    for command in (("verify",), ("get", "--out", tmp_path / "out")):
        shown = espalier(*command, "33pct", "--storage", store.url)
        assert shown.exit_code == 1
        assert "no best model at 33pct; there are 10B, 50pct" in shown.stderr


def test_removes_one_model_after_asking(store: Store) -> None:
    asked = espalier("rm", "50pct", "--plan", "bbbb", "--storage", store.url)
    assert asked.exit_code == 1
    assert len(entries(store)) == 3
    espalier("rm", "50pct", "--plan", "aa", "--storage", store.url, "--yes")
    assert [entry.plan_digest for entry in entries(store)] == ["bbbb", "cccc"]
    assert published(store, layout.model("50pct", "aaaa")) is None
    assert published(store, BEST) is not None
    espalier("rm", "50pct", "--plan", "bbbb", "--storage", store.url, "--yes")
    assert [entry.plan_digest for entry in entries(store)] == ["cccc"]
    assert list(store.keys(layout.best("50pct"))) == []
    gone = espalier("rm", "50pct", "--plan", "bbbb", "--storage", store.url, "--yes")
    assert gone.exit_code == 1
    assert "has a plan bbbb" in gone.stderr


@pytest.mark.parametrize(
    ("plan", "said"), [("", "--plan: is empty"), ("a", "2 plans at 50pct begin so, aaaa, abcd")]
)
def test_several_models_are_never_removed_at_once(store: Store, plan: str, said: str) -> None:
    (first,) = (entry for entry in entries(store) if entry.plan_digest == "aaaa")
    add(store, first.model_copy(update={"plan_digest": "abcd", "model": None}))
    refused = espalier("rm", "50pct", "--plan", plan, "--storage", store.url, "--yes")
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert len(entries(store)) == 4


def test_a_removal_that_was_cut_off_is_finished_by_another(store: Store) -> None:
    registry.show_best(store, "50pct")
    (chosen,) = (entry for entry in entries(store) if entry.plan_digest == "bbbb")
    registry.withdraw_entry(store, chosen)
    again = espalier("rm", "50pct", "--plan", "bbbb", "--storage", store.url, "--yes")
    assert again.exit_code == 1
    assert [key.rpartition("/")[2] for key in store.keys(layout.best("50pct"))] == [
        "manifest.json", "model_index.json",
    ]  # fmt: skip
