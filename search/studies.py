"""Keeps a search's trials in an Optuna storage too, where optuna-dashboard opens them.

A study shows a search; it decides nothing. Proposals are made from our own store
(search/proposals.py), so a study that was lost is written anew from there. For the same reason its
parameters need not be those that were proposed, dozens a plan: they are what a person reads off the
plan (search/features.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar

from search.features import plan_features
from search.objectives import DEFAULT, Scored
from search.report.plan_picture import in_words
from storage.errors import EspalierError
from storage.urls import folder_name, without_password

if TYPE_CHECKING:
    import optuna

    from search.trials import Trial

Result = TypeVar("Result")

ATTEMPTS = 12
"""How often a database is tried that does not answer: for two minutes, in which another takes the
place of one that fell over."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
"""Before the second attempt, doubled before each later one; and the most."""

DETAILS = ("params", "distributions", "user_attrs")
"""Of a trial in a journal: what dashboards show and a search has no use for."""


class StudyError(EspalierError):
    """An Optuna storage that cannot be used, or a study that belongs to something else."""


def journal_file(store_url: str, name: str) -> str:
    """Where a sweep's study is kept unless the configuration says otherwise: a journal beside the
    sweep in a folder, in the user's cache when the store is an object store."""
    if "://" in store_url:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "espalier" / "studies" / folder_name(store_url)
    else:
        folder = Path(store_url) / "studies"
    return str(folder / f"{name}.journal")


def checked_url(url: str) -> str:
    """The URL itself; ValueError when it holds a password."""
    return without_password(
        url, "leave it to the database's own means, such as PGPASSWORD or ~/.pgpass"
    )


class StudyLog:
    """The study of one sweep, named as the sweep."""

    def __init__(
        self,
        url: str,
        name: str,
        teacher: str,
        search: str,
        store: str | None,
        objectives: Sequence[Scored] = DEFAULT,
    ) -> None:
        """Opens or makes the study at `url`, a journal's path or a database's URL.

        `teacher` and `search` are digests, `store` is the URL of the sweep's storage; None where
        the study lies in it, and moves when it does. StudyError when the study belongs to another
        teacher or to a sweep elsewhere; the trials of another search of the same sweep give way to
        this one's.
        """
        self.url, self._name = url, name
        self._gone: StudyError | None = None
        """Why the database was given up."""
        self._objectives = tuple(objectives)
        self._study: optuna.Study = self._tried(partial(self._open, teacher, search, store))
        self._next = len(self._study.get_trials(False))
        self._early: dict[int, Trial] = {}

    def add(self, trials: Sequence[Trial]) -> None:
        """Adds those that are not there. StudyError when the database does not answer.

        A study numbers its trials as they come, so one waits here for those before it: trial 12 of
        the dashboard is trial 12 of the report. A database that did not answer for minutes is not
        waited for again.
        """
        if self._gone is not None:
            raise self._gone
        self._early |= {trial.number: trial for trial in trials if trial.number >= self._next}
        while self._next in self._early:
            self._tried(partial(self._put, _frozen(self._early[self._next], self._objectives)))
            del self._early[self._next]
            self._next += 1

    def _put(self, trial: optuna.trial.FrozenTrial, again: bool) -> None:
        # A database that went away may have taken it, and not have said so.
        if not again or len(self._study.get_trials(False)) == self._next:
            self._study.add_trial(trial)

    def _open(self, teacher: str, search: str, store: str | None, again: bool) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names
        storage = _storage(self.url)
        owner = {"teacher": teacher, "search": search}
        if store is not None:
            owner["storage"] = store
        names = optuna.get_all_study_names(storage)
        if self._name in names:
            study = optuna.load_study(study_name=self._name, storage=storage)
            other = study.user_attrs.get("teacher")
            # One that says nothing and has nothing was cut off as it was made.
            if other != teacher and (other is not None or study.get_trials(False)):
                raise StudyError(
                    f"{self.url}: its study {self._name} belongs to another teacher ({other}); "
                    f"this one is {teacher}: give the sweep another name or another search.study"
                )
            home = study.user_attrs.get("storage", store)
            if store is not None and home != store:
                raise StudyError(
                    f"{self.url}: its study {self._name} belongs to a sweep in {home}; give this "
                    "one another name or another search.study"
                )
            if study.user_attrs.get("search") == search:
                return study
            optuna.delete_study(study_name=self._name, storage=storage)
        study = optuna.create_study(
            study_name=self._name,
            storage=storage,
            directions=["minimize"] * len(self._objectives),
        )
        study.set_metric_names([name.replace("_", " ") for name in self._objectives])
        for key, value in owner.items():
            study.set_user_attr(key, value)
        return study

    def _tried(self, work: Callable[[bool], Result]) -> Result:
        """Calls `work`, again after a while when the database does not answer; it is told whether
        it is called again."""
        from sqlalchemy.exc import DBAPIError

        failures = 0
        while True:
            try:
                return work(failures > 0)
            except (DBAPIError, OSError, _storage_error()) as error:
                failures += 1
                if failures == ATTEMPTS:
                    self._gone = StudyError(
                        f"{self.url}: the study's database does not answer "
                        f"({_first_line(error)}); what is scored is kept: run the same command "
                        "again when it does"
                    )
                    raise self._gone from error
                sleep(min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS))


def _frozen(trial: Trial, objectives: Sequence[Scored]) -> optuna.trial.FrozenTrial:
    import optuna

    features = plan_features(trial.plan)
    whole = trial.fidelity_loss is not None
    states, distributions = optuna.trial.TrialState, optuna.distributions
    frozen = optuna.trial.create_trial(
        state=states.COMPLETE if whole else states.FAIL,
        values=list(trial.values(objectives)) if whole else None,
        constraints=None if trial.over is None else {"budget": trial.over},
        params=features,
        distributions={
            name: distributions.IntDistribution(0, trial.plan.teacher_blocks)
            if isinstance(value, int)
            else distributions.FloatDistribution(0.0, 1.0)
            for name, value in features.items()
        },
        user_attrs={
            "budget": trial.budget,
            "origin": trial.origin,
            "summed damage": trial.damage,
            "plan": trial.plan.digest,
            "in words": in_words(trial.plan),
        }
        | ({} if trial.expected is None else {"expected": trial.expected})
        # optuna-dashboard 0.21 does not read the constraints of Optuna 5.
        | ({} if trial.over is None else {"over budget": trial.over})
        | ({} if trial.failed is None else {"failed": trial.failed}),
    )
    # Scored just now; the timeline shows for how long.
    frozen.datetime_complete = datetime.now()
    frozen.datetime_start = frozen.datetime_complete - timedelta(seconds=trial.seconds)
    return frozen


def _storage(url: str) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from sqlalchemy.exc import ArgumentError

    if "://" in url:
        try:
            return RDBStorage(url)
        except (ImportError, ArgumentError) as error:
            raise StudyError(
                f"search.study: {url} cannot be opened ({_first_line(error)}); write "
                "sqlite:///FILE or postgresql://USER@HOST/NAME, and install the database's driver "
                "for Python, such as psycopg[binary] for PostgreSQL"
            ) from error
    Path(url).parent.mkdir(parents=True, exist_ok=True)
    _end_with_a_line(Path(url))
    return JournalStorage(_journal(url))


def _end_with_a_line(journal: Path) -> None:
    """Cuts off half a line, which a writer that was killed has left and to which Optuna would add
    the next; what stood there is written anew."""
    with journal.open("ab+") as stream:
        stream.seek(0)
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


def _journal(path: str) -> Any:
    """The journal at a path, of whose trials this process reads that they are there and no more.

    Optuna keeps what it reads of a journal in memory, 4 KiB a trial where this is 1.
    """
    from optuna.storages.journal import JournalFileBackend

    class Journal(JournalFileBackend):
        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            for log in super().read_logs(log_number_from):
                yield {key: value for key, value in log.items() if key not in DETAILS}

    return Journal(path)


def _storage_error() -> type[Exception]:
    from optuna.exceptions import StorageInternalError

    return StorageInternalError


def _first_line(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0]
