"""A search's study: what optuna-dashboard reads, whose it is, and what happens without it."""

from __future__ import annotations

import gc
import random
import sqlite3
import tracemalloc
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pydantic import ValidationError

import search.studies
from search.features import plan_features
from search.samplers import SAMPLERS
from search.solver import Piece
from search.space import Space, candidates
from search.studies import StudyError, StudyLog, check_study, journal_file
from search.trials import SearchConfig, Trial
from tests.postgres import Postgres

BLOCKS = 4


def make_space() -> Space:
    rng = random.Random(0)
    pieces = {
        block: Piece(0.0 if block.untouched else rng.random(), 10)
        for block in candidates(BLOCKS, 2, (1.0,))
    }
    return Space("qwen_image", BLOCKS, 5, pieces)


SPACE = make_space()
PLANS = SPACE.exact(45, 4)
PLANS_BY_DIGEST = {plan.digest: number for number, plan in enumerate(PLANS)}


def trial(number: int, loss: float | None = 0.25) -> Trial:
    return Trial(
        number=number,
        budget="50pct",
        origin=SAMPLERS[0],
        plan=PLANS[number],
        parameters=SPACE.cost(PLANS[number]),
        damage=SPACE.damage(PLANS[number]),
        expected=None,
        fidelity_loss=loss,
        seconds=0.1,
        state="failed" if loss is None else "complete",
        failed="its velocity is not a number" if loss is None else None,
    )


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        return server.database()
    journal = journal_file(str(tmp_path / "runs"), "one")
    return journal if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


def read(url: str, name: str = "one") -> optuna.Study:
    storage = url if "://" in url else JournalStorage(JournalFileBackend(url))
    return optuna.load_study(study_name=name, storage=storage)


def opened(
    url: str, name: str = "one", teacher: str = "t", made_by: str = "s", store: str = "runs"
) -> StudyLog:
    return StudyLog(url, name, teacher, made_by, store)


def numbers(url: str, name: str = "one") -> list[int]:
    return [PLANS_BY_DIGEST[t.user_attrs["plan"]] for t in read(url, name).trials]


def test_shows_every_trial_once_while_the_search_runs(url: str) -> None:
    log = opened(url)
    log.add([trial(0)])
    assert len(read(url).trials) == 1
    log.add([trial(0), trial(1, None)])
    resumed = opened(url)
    resumed.add([trial(0), trial(1, None), trial(2, 0.5)])
    study = read(url)
    assert numbers(url) == [0, 1, 2]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[2].values == [0.5, SPACE.cost(PLANS[2])]
    assert study.metric_names == ["fidelity loss", "parameters"]


def test_a_trial_shows_what_a_person_reads_off_its_plan(url: str) -> None:
    opened(url).add([trial(0), trial(1, None)])
    whole, failed = read(url).trials
    assert whole.params == plan_features(PLANS[0])
    assert whole.user_attrs["in words"].startswith(f"{BLOCKS} teacher blocks become ")
    assert (whole.duration or timedelta()).total_seconds() == pytest.approx(0.1)
    assert "not a number" in failed.user_attrs["failed"]


def test_trials_keep_their_numbers_though_they_end_out_of_order(url: str) -> None:
    log = opened(url)
    log.add([trial(1)])
    assert numbers(url) == []
    log.add([trial(0)])
    log.add([trial(2)])
    assert numbers(url) == [0, 1, 2]


def test_a_journal_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Of each trial 1 KiB is; what a journal of ten thousand takes does not show."""
    url = journal_file(str(tmp_path), "one")

    def many(first: int) -> list[Trial]:
        return [replace(trial(n % len(PLANS)), number=n) for n in range(first, first + 50)]

    log = opened(url)
    log.add(many(0))
    tracemalloc.start()
    try:
        log.add(many(50))
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50 * 2048
    assert [t.params for t in read(url).trials[:4]] == [plan_features(plan) for plan in PLANS]


def test_another_search_of_the_sweep_takes_the_studys_place(url: str) -> None:
    opened(url).add([trial(0), trial(1)])
    opened(url, made_by="changed").add([trial(0, 0.75)])
    assert [t.values[0] for t in read(url).trials] == [0.75]


def test_a_study_of_another_teacher_is_refused_and_left_alone(url: str) -> None:
    opened(url).add([trial(0)])
    with pytest.raises(StudyError, match="study one belongs to another teacher"):
        opened(url, teacher="other")
    assert len(read(url).trials) == 1


def test_a_study_of_a_sweep_elsewhere_is_refused_and_left_alone(url: str) -> None:
    opened(url).add([trial(0)])
    with pytest.raises(StudyError, match="study one belongs to a sweep in runs; give this one"):
        opened(url, made_by="another", store="s3://bucket/team")
    assert len(read(url).trials) == 1


def test_a_study_inside_a_storage_folder_moves_with_it(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    StudyLog(str(tmp_path / "runs" / "j"), "one", "t", "s", None).add([trial(0)])
    (tmp_path / "runs").rename(tmp_path / "moved")
    url = str(tmp_path / "moved" / "j")
    StudyLog(url, "one", "t", "s", None).add([trial(0), trial(1)])
    assert numbers(url) == [0, 1]
    # From before, when every study said where its storage was.
    opened(url, name="two").add([trial(0)])
    StudyLog(url, "two", "t", "s", None)


def test_a_study_whose_making_was_cut_off_is_made_anew(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(study: optuna.Study, key: str, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "set_user_attr", cut)
        with pytest.raises(KeyboardInterrupt):
            opened(url)
    opened(url).add([trial(0)])
    assert numbers(url) == [0]
    with pytest.raises(StudyError, match=r"another teacher \(t\)"):
        opened(url, teacher="other")


def test_a_trial_that_a_database_took_before_it_fell_silent_is_not_added_twice(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(url)
    add = log._study.add_trial

    def silent(trial: optuna.trial.FrozenTrial) -> None:
        add(trial)
        monkeypatch.undo()
        monkeypatch.setattr(search.studies, "sleep", lambda seconds: None)
        raise OSError("connection lost")

    monkeypatch.setattr(log._study, "add_trial", silent)
    log.add([trial(0), trial(1)])
    assert numbers(url) == [0, 1]


@pytest.mark.parametrize("lost", [1, 15, 200])
def test_a_journal_whose_writer_was_killed_goes_on(tmp_path: Path, lost: int) -> None:
    url = journal_file(str(tmp_path), "one")
    opened(url).add([trial(0), trial(1)])
    whole = Path(url).read_bytes()
    Path(url).write_bytes(whole[:-lost])
    opened(url).add([trial(0), trial(1), trial(2)])
    assert numbers(url) == [0, 1, 2]


@pytest.mark.parametrize(
    "content", [b"SQLite format 3\x00 with no line's end", b"notes\nof mine", b'{"a": 1}']
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "study.db"
    file.write_bytes(content)
    for refused in (opened, lambda url: check_study(url, "one", "t", "runs")):
        with pytest.raises(StudyError, match=r"study.db is there and no journal .*sqlite:///FILE"):
            refused(str(file))
        assert file.read_bytes() == content


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    url = journal_file(str(tmp_path), "one")
    opened(url).add([trial(0)])
    lines = Path(url).read_bytes().splitlines(keepends=True)
    Path(url).write_bytes(b"".join([*lines[:2], b"nonsense\n", *lines[2:]]))
    with pytest.raises(StudyError, match=r"one.journal is damaged .*move it away"):
        opened(url)


def test_what_waiting_cannot_help_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.studies, "sleep", lambda seconds: pytest.fail("it waits"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "one.journal"):
        with pytest.raises(StudyError, match=r"search.study: .*name a file that can be written"):
            opened(str(path))


def test_a_database_that_is_not_there_is_told_before_minutes_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(search.studies, "sleep", waited.append)
    with pytest.raises(StudyError, match="does not answer"):
        check_study(f"sqlite:///{tmp_path}/none/study.db", "one", "t", "runs")
    assert sum(waited) < 10


def test_a_database_of_another_optuna_is_told(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    opened(url)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    database.close()
    with pytest.raises(StudyError, match=r"search.study: .*optuna"):
        opened(url)


def test_checking_a_study_changes_nothing(url: str) -> None:
    check_study(url, "one", "t", "runs")
    opened(url).add([trial(0)])
    check_study(url, "one", "t", "runs")
    assert numbers(url) == [0]
    with pytest.raises(StudyError, match="belongs to another teacher"):
        check_study(url, "one", "other", "runs")
    with pytest.raises(StudyError, match="belongs to a sweep in runs"):
        check_study(url, "one", "t", "elsewhere")


def test_sweeps_share_a_storage(url: str) -> None:
    opened(url).add([trial(0)])
    opened(url, name="two", teacher="other").add([trial(0), trial(1)])
    assert (len(read(url).trials), len(read(url, "two").trials)) == (1, 2)


def test_a_database_that_comes_back_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.db"
    log = opened(f"sqlite:///{file}?timeout=0.05")
    log.add([trial(0)])
    away = sqlite3.connect(file, isolation_level=None)
    away.execute("BEGIN EXCLUSIVE")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            away.execute("ROLLBACK")

    monkeypatch.setattr(search.studies, "sleep", wait)
    log.add([trial(1)])
    assert waited == [0.5, 1.0]
    away.execute("BEGIN EXCLUSIVE")
    waited.clear()
    monkeypatch.setattr(search.studies, "sleep", waited.append)
    for number in (2, 3):  # the others that were in flight wait no second time
        with pytest.raises(StudyError, match=r"does not answer .*; what is scored is kept"):
            log.add([trial(number)])
        assert len(waited) == search.studies.ATTEMPTS - 1
    away.execute("ROLLBACK")
    away.close()
    opened(f"sqlite:///{file}").add([trial(0), trial(1), trial(2)])
    assert numbers(f"sqlite:///{file}") == [0, 1, 2]


def test_a_server_that_is_started_again_loses_nothing(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    log = opened(url)
    log.add([trial(0)])
    postgres.kill()
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            postgres.start()

    monkeypatch.setattr(search.studies, "sleep", wait)
    log.add([trial(1), trial(2)])
    assert waited == [0.5, 1.0]
    assert numbers(url) == [0, 1, 2]


def test_a_password_in_the_configuration_is_refused() -> None:
    with pytest.raises(ValidationError, match="PGPASSWORD"):
        SearchConfig(study="postgresql://me:secret@host/db")
    assert SearchConfig(study="postgresql://me@host/db").study == "postgresql://me@host/db"


def test_an_object_stores_study_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert journal_file("s3://bucket/prefix", "one").startswith(str(tmp_path))
    assert journal_file("s3://bucket/a_b", "one") != journal_file("s3://bucket/a/b", "one")


def test_shows_the_objectives_that_are_sought_and_what_breaks_a_budget(url: str) -> None:
    log = StudyLog(url, "one", "t", "s", "runs", ("latency", "fidelity_loss"))
    timed: dict[str, Any] = {"costs": {"latency": 700}, "measured": {"latency": 900}, "over": 0.125}
    log.add([replace(trial(0), **timed), replace(trial(1), **{**timed, "over": -0.5})])
    study = read(url)
    assert study.metric_names == ["latency", "fidelity loss"]
    assert [t.values for t in study.trials] == [[900, 0.25], [900, 0.25]]
    assert [t.constraints for t in study.trials] == [{"budget": 0.125}, {"budget": -0.5}]
    assert [t.user_attrs["over budget"] for t in study.trials] == [0.125, -0.5]
    assert [t.number for t in study.best_trials] == [1]


@pytest.mark.parametrize("url", ["nosuch://host/name", "mysql+nosuch://host/name"])
def test_a_database_without_a_driver_is_named(url: str) -> None:
    with pytest.raises(StudyError, match=r"search.study: .* install the database's driver"):
        StudyLog(url, "one", "teacher", "search", "runs")
