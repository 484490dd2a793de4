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
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

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
TO_OPEN = 4
"""Attempts before anything has begun: a wrong address or password is told within seconds."""

POSTGRESQL = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
"""What libpq is told: seconds, seconds, milliseconds."""

_BEGINS = b'{"op_code":'
"""How every line of a journal begins."""

_WRONG_PLACE = (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
"""What a journal's path ends in that no waiting helps."""

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


def check_study(url: str, name: str, teacher: str, store: str | None) -> None:
    """StudyError when `StudyLog` would refuse the same: found before anything is paid for, and
    nothing is changed."""
    if "://" not in url and not Path(url).exists():
        return
    tried(url, lambda again: owned(open_storage(url), url, name, teacher, store), TO_OPEN)


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
        opened = partial(self._open, teacher, search, store)
        self._study: optuna.Study = tried(url, opened, TO_OPEN)
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
            put = partial(self._put, _frozen(self._early[self._next], self._objectives))
            try:
                tried(self.url, put)
            except StudyError as error:
                self._gone = error
                raise
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
        storage = open_storage(self.url)
        owner = {"teacher": teacher, "search": search}
        if store is not None:
            owner["storage"] = store
        study = owned(storage, self.url, self._name, teacher, store)
        if study is not None:
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


def tried(url: str, work: Callable[[bool], Result], attempts: int = ATTEMPTS) -> Result:
    """Calls `work`, again after a while when the database at `url` does not answer; it is told
    whether it is called again. StudyError when it never does, or when that cannot help."""
    from optuna.exceptions import DuplicatedStudyError, StorageInternalError
    from sqlalchemy.exc import DBAPIError

    failures = 0
    while True:
        try:
            return work(failures > 0)
        except _WRONG_PLACE as error:
            raise StudyError(
                f"search.study: {error.filename or url}: {error.strerror}; name a file that can be "
                "written, or a database's URL"
            ) from error
        # A duplicate: another process has made it at the same moment, and now it is there.
        except (DBAPIError, OSError, StorageInternalError, DuplicatedStudyError) as error:
            failures += 1
            if failures == attempts:
                raise StudyError(
                    f"{url}: the study's database does not answer ({_first_line(error)}); what is "
                    "scored is kept: run the same command again when it does"
                ) from error
            sleep(min(FIRST_WAIT_SECONDS * 2 ** (failures - 1), LONGEST_WAIT_SECONDS))


def owned(
    storage: Any, url: str, name: str, teacher: str, store: str | None
) -> optuna.Study | None:
    """The study of that name, None when there is none; StudyError when it belongs to another
    teacher or to a sweep elsewhere."""
    import optuna

    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    other = study.user_attrs.get("teacher")
    # One that says nothing and has nothing was cut off as it was made.
    if other != teacher and (other is not None or study.get_trials(False)):
        raise StudyError(
            f"{url}: its study {name} belongs to another teacher ({other}); this one is {teacher}: "
            "give the sweep another name or another search.study"
        )
    home = study.user_attrs.get("storage", store)
    if store is not None and home != store:
        raise StudyError(
            f"{url}: its study {name} belongs to a sweep in {home}; give this one another name or "
            "another search.study"
        )
    return study


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


def open_storage(url: str) -> Any:
    """Optuna's storage at a journal's path or a database's URL. StudyError when that is neither."""
    from optuna.storages import JournalStorage, RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" in url:
        try:
            # A server that vanished without a word would be waited for as long as TCP does.
            driver = make_url(url).get_driver_name()
            waits = POSTGRESQL if driver in ("psycopg", "psycopg2") else {}
            return RDBStorage(url, engine_kwargs={"connect_args": waits})
        except (ImportError, ArgumentError) as error:
            raise StudyError(
                f"search.study: {url} cannot be opened ({_first_line(error)}); write "
                "sqlite:///FILE or postgresql://USER@HOST/NAME, and install the database's driver "
                "for Python, such as psycopg[binary] for PostgreSQL"
            ) from error
        except RuntimeError as error:  # tables of another version of Optuna
            raise StudyError(f"search.study: {url}: {_first_line(error)}") from error
    Path(url).parent.mkdir(parents=True, exist_ok=True)
    _end_with_a_line(Path(url))
    try:
        return JournalStorage(_journal(url))
    except ValueError as error:  # a line that is no JSON
        raise StudyError(
            f"search.study: {url} is damaged ({_first_line(error)}); move it away, what is scored "
            "is kept elsewhere"
        ) from error


def _end_with_a_line(journal: Path) -> None:
    """Cuts off half a line, which a writer that was killed has left and to which Optuna would add
    the next; what stood there is written anew. StudyError, and nothing cut, when the file is no
    journal."""
    from optuna.storages.journal import JournalFileSymlinkLock

    with journal.open("ab+") as stream:
        stream.seek(0)
        begins = stream.read(len(_BEGINS))
        if begins != _BEGINS[: len(begins)]:
            raise StudyError(
                f"search.study: {journal} is there and no journal of Optuna's; name another file, "
                "or write sqlite:///FILE if it is a database"
            )
        if not _half_a_line(stream):
            return
        # Another sweep may be writing to it at this moment: then it ends with a line by now.
        lock = JournalFileSymlinkLock(str(journal))
        lock.acquire()
        try:
            half = _half_a_line(stream)
            stream.truncate(stream.seek(0, os.SEEK_END) - half)
        finally:
            lock.release()


def _half_a_line(stream: BinaryIO) -> int:
    """How many bytes follow the last line's end."""
    stream.seek(0)
    content = stream.read()
    return len(content) - (content.rfind(b"\n") + 1)


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


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error.__cause__ or error).__name__
