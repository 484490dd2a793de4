"""The studies of races: what optuna-dashboard shows of recoveries."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import search.studies
from search.racelog import RaceLog
from search.samplers import SAMPLERS, Sampler
from search.tiers import Race, Rules
from tests.search.races import SPACE, Bench, two_tiers


@pytest.fixture(params=["journal", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    file = tmp_path / "study"
    return str(file) if request.param == "journal" else f"sqlite:///{file}"


def read(url: str) -> list[optuna.trial.FrozenTrial]:
    storage = url if "://" in url else JournalStorage(JournalFileBackend(url))
    return optuna.load_study(study_name="one/half", storage=storage).trials


def opened(url: str, teacher: str = "t") -> RaceLog:
    return RaceLog(url, "one", teacher, "runs", SPACE)


def states(url: str) -> list[str]:
    return [trial.state.name for trial in read(url)]


def run(bench: Bench, race: Race, log: RaceLog, most: int = 99) -> None:
    """Runs what waits, telling the log before and after each."""
    while most > 0 and (waiting := race.waiting()) is not None:
        race.take(waiting)
        log.show([race])
        bench.end(waiting)
        log.show([race])
        most -= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_who_was_stopped_is_pruned_who_failed_failed_and_the_rest_complete(
    url: str, sampler: Sampler
) -> None:
    def losses(_: int, number: int, tier: int) -> float | None:
        return None if number == 1 else (0.4 - 0.1 * number) / (tier + 1)

    bench = Bench(losses, Rules(1, 4, 2, 0.25, -1, sampler))
    race = bench.race()
    run(bench, race, opened(url))
    assert states(url) == ["PRUNED", "FAIL", "PRUNED", "COMPLETE"]
    trials = read(url)
    assert [trial.params for trial in trials] == [dict(c.choice) for c in race.candidates]
    assert list(trials[0].intermediate_values.values()) == [0.4]
    assert list(trials[3].intermediate_values.values()) == pytest.approx([0.1, 0.05])
    assert trials[3].value == pytest.approx(0.05)
    assert trials[1].user_attrs["failed"] == "not finite"
    assert all(trial.user_attrs["finalist"] == 0 for trial in trials)


def test_what_is_not_decided_is_shown_running(url: str) -> None:
    bench = Bench(lambda _, number, tier: 0.1 * (number + 1), two_tiers(1, 3))
    race, log = bench.race(), opened(url)
    run(bench, race, log, most=2)
    assert states(url) == ["RUNNING", "RUNNING", "RUNNING"]
    assert [list(t.intermediate_values.values()) for t in read(url)] == [[0.1], [0.2], []]


def test_a_race_that_goes_on_is_shown_once(url: str) -> None:
    bench = Bench(lambda _, number, tier: 0.1 * (number + 1), two_tiers(1, 3))
    run(bench, bench.race(), opened(url), most=2)
    run(bench, bench.race(), opened(url))
    assert states(url) == ["COMPLETE", "PRUNED", "PRUNED"]


def test_a_database_that_fell_silent_in_the_middle_has_every_trial_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/study.db?timeout=0.05"
    bench = Bench(lambda _, number, tier: 0.1 * (number + 1), two_tiers(1, 3))
    race, log = bench.race(), opened(url)
    run(bench, race, log, most=2)
    away = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    away.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(search.studies, "sleep", lambda seconds: away.execute("ROLLBACK"))
    run(bench, race, log)
    away.close()
    assert states(url) == ["COMPLETE", "PRUNED", "PRUNED"]


def test_no_recovery_waits_for_a_database_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(search.studies, "sleep", waited.append)
    bench = Bench(lambda *_: 0.1, two_tiers(1, 3))
    race, log = bench.race(), opened(f"sqlite:///{tmp_path}/none/study.db")
    run(bench, race, log)
    assert race.done
    assert sum(waited) < 10
    assert [record.message for record in caplog.records if "the recoveries go on" in record.message]


def test_another_teachers_study_is_left_alone(url: str, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(lambda *_: 0.1, two_tiers(1, 3))
    run(bench, bench.race(), opened(url))
    before = read(url)
    other = Bench(lambda *_: 0.2, two_tiers(1, 3))
    run(other, other.race(), opened(url, teacher="other"))
    assert [t.value for t in read(url)] == [t.value for t in before]
    assert "belongs to another teacher" in caplog.text
