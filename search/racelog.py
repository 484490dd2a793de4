"""Shows the races of schedules in the Optuna storage of the search: a study for each budget.

A candidate is a trial that runs until its race is decided: complete when it came to its schedule's
end, pruned when others were better in a lower tier, failed when it failed; its losses tier by tier
are its intermediate values. Like a search's study these decide nothing. What samplers are told is
said in search/tiers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from search.studies import TO_OPEN, StudyError, open_storage, owned, tried
from search.tiers import Candidate, Race, distributions
from trainers.schedule import ScheduleSpace

if TYPE_CHECKING:
    import optuna

_log = logging.getLogger(__name__)


@dataclass
class _Shown:
    """A candidate as far as it has been written."""

    trial: optuna.Trial
    tiers: int = 0
    """Of which its loss is reported."""
    decided: bool = False


def race_study(sweep: str, budget: str) -> str:
    """The study of a budget's race; no sweep is named so."""
    return f"{sweep}/{budget}"


class RaceLog:
    """The studies of one sweep's races, written anew by every run of them."""

    def __init__(
        self, url: str, sweep: str, teacher: str, store: str | None, space: ScheduleSpace
    ) -> None:
        """As for `StudyLog`; nothing is opened yet. `space`: of which schedules are chosen."""
        self._url, self._sweep, self._teacher, self._store = url, sweep, teacher, store
        self._space = space
        self._gone = False
        self._studies: dict[str, optuna.Study] = {}
        """By budget."""
        self._shown: dict[Candidate, _Shown] = {}

    def show(self, races: Sequence[Race]) -> None:
        """Write what is new. A database that does not answer is told of once, by a warning: no
        training waits for a picture of it."""
        if self._gone:
            return
        try:
            tried(self._url, partial(self._write, races), TO_OPEN)
        except StudyError as error:
            self._gone = True
            _log.warning("%s (the recoveries go on, and will not be shown there)", error)

    def _write(self, races: Sequence[Race], again: bool) -> None:
        if again:  # what it took of the attempt before is not known
            self._studies.clear()
            self._shown.clear()
        for race in races:
            if race.budget not in self._studies:
                self._studies[race.budget] = self._made(race.budget)
            for candidate in race.candidates:
                self._show(self._studies[race.budget], race, candidate)

    def _made(self, budget: str) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name, storage = race_study(self._sweep, budget), open_storage(self._url)
        if owned(storage, self._url, name, self._teacher, self._store) is not None:
            optuna.delete_study(study_name=name, storage=storage)
        sampler = optuna.samplers.RandomSampler()  # asked for nothing: every value is given
        study = optuna.create_study(study_name=name, storage=storage, sampler=sampler)
        study.set_user_attr("teacher", self._teacher)
        if self._store is not None:
            study.set_user_attr("storage", self._store)
        return study

    def _show(self, study: optuna.Study, race: Race, candidate: Candidate) -> None:
        from optuna.trial import TrialState

        if candidate not in self._shown:
            self._shown[candidate] = _Shown(self._begun(study, candidate))
        shown, outcomes = self._shown[candidate], race.outcomes(candidate)
        if shown.decided:
            return
        for _, outcome in outcomes[shown.tiers :]:
            if outcome.fidelity_loss is not None:
                shown.trial.report(outcome.fidelity_loss, outcome.steps)
            shown.tiers += 1
        tier, last = max(outcomes, key=lambda pair: pair[0], default=(-1, None))
        if last is not None and last.fidelity_loss is None:
            shown.trial.set_user_attr("failed", last.failed)
            study.tell(shown.trial, state=TrialState.FAIL)
        elif last is not None and tier == race.tiers[-1]:
            study.tell(shown.trial, last.fidelity_loss)
        elif race.done:
            study.tell(shown.trial, state=TrialState.PRUNED)
        else:
            return
        shown.decided = True

    def _begun(self, study: optuna.Study, candidate: Candidate) -> optuna.Trial:
        finalist = candidate.finalist
        facts = {
            "plan": finalist.plan.digest,
            "finalist": finalist.rank,
            "assembled": finalist.loss,
        }
        study.enqueue_trial(dict(candidate.choice), user_attrs=facts)
        return study.ask(distributions(self._space))
