"""What Tune asks of its searchers beside suggestions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TextIO

import pytest
from ray import cloudpickle
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.tune.search import Searcher

from search.budget import Target
from search.proposals import Proposal, Proposals
from search.racing import RaceSearcher, cause
from search.score import Score
from search.study import PATIENCE, RETRIES, PlanSearcher, final, lost, score_json
from storage.errors import DamagedError, StoreError
from tests.search.test_proposals import make_space


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    """What nothing can pickle, and a person runs a sweep on."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        yield stream
    os.close(master)


class Shown:
    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal

    def update(self, done: int, total: int, **facts: float | str) -> None:
        print(done, total, file=self.terminal)


def test_tune_can_pickle_a_searcher_that_shows_progress_on_a_terminal(terminal: TextIO) -> None:
    shown = Shown(terminal)
    with pytest.raises(Exception, match="tty"):
        cloudpickle.dumps(shown)
    proposals = Proposals(make_space(), [Target("50pct", 45)], trials=2, exact=1, lag=1, seed=0)
    searchers: list[Searcher] = [
        PlanSearcher(proposals, lambda _: None, lambda *_: shown.update(1, 2), 60.0),
        RaceSearcher([], lambda *_: None, lambda _: {}, shown),  # type: ignore[arg-type]
    ]
    for searcher in searchers:
        cloudpickle.dumps(searcher)


def test_a_result_that_cannot_be_kept_ends_the_search_with_the_reason() -> None:
    def full(proposal: Proposal, score: Score) -> None:
        raise StoreError("the disk is full")

    proposals = Proposals(make_space(), [Target("50pct", 45)], trials=2, exact=1, lag=1, seed=0)
    searcher = PlanSearcher(proposals, lambda _: None, full, 60.0)
    assert isinstance(searcher.suggest("a"), dict)
    searcher.on_trial_complete("a", {"score": score_json(Score(0.5, 0.1)).decode()})
    assert searcher.error == "the disk is full"
    assert searcher.suggest("b") == Searcher.FINISHED


def searched(plans: int) -> tuple[PlanSearcher, list[Score]]:
    """A search of so many plans, and what it takes for their scores."""
    taken: list[Score] = []
    target = Target("50pct", 45)
    proposals = Proposals(make_space(), [target], trials=plans, exact=1, lag=1, seed=0)
    searcher = PlanSearcher(proposals, lambda _: None, lambda _, score: taken.append(score), 60.0)
    return searcher, taken


def end(searcher: PlanSearcher, trial: str, result: dict[str, str] | None) -> None:
    """One plan's end; without a result its process is lost as often as it is handed out."""
    plan = searcher.suggest(trial)
    assert isinstance(plan, dict)
    if result is None:
        for _ in range(RETRIES):
            searcher.on_trial_complete(trial, error=True)
            assert searcher.suggest(trial) == plan
    searcher.on_trial_complete(trial, result, error=result is None)


GOOD = {"score": score_json(Score(0.5, 0.1)).decode()}


def test_a_plan_without_a_score_fails_alone_and_with_its_reason() -> None:
    searcher, taken = searched(4)
    for trial, result in enumerate((GOOD, {"failed": "MemoryError: too large"}, None, GOOD)):
        end(searcher, str(trial), result)
    assert searcher.error is None
    assert [score.failed for score in taken] == [None, "MemoryError: too large", lost(60.0), None]


def test_a_plan_whose_process_was_lost_is_scored_by_another() -> None:
    searcher, taken = searched(2)
    plan = searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    assert (taken, searcher.suggest("b")) == ([], plan)
    searcher.on_trial_complete("b", GOOD)
    end(searcher, "c", GOOD)
    assert [score.failed for score in taken] == [None, None]
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_plan_lost_as_the_last_one_is_still_waited_for() -> None:
    searcher, _ = searched(1)
    plan = searcher.suggest("a")
    assert searcher.suggest("b") == Searcher.FINISHED  # Tune asks for no more in this run
    searcher.on_trial_complete("a", error=True)
    assert searcher.advance()
    assert searcher.suggest("c") == plan


def test_a_first_plan_without_a_score_ends_the_search() -> None:
    searcher, taken = searched(2)
    end(searcher, "a", {"failed": "RuntimeError: no driver"})
    assert (searcher.error, taken) == ("trial 0: RuntimeError: no driver", [])
    assert searcher.suggest("b") == Searcher.FINISHED


def test_plans_in_a_row_without_a_score_end_the_search() -> None:
    searcher, taken = searched(20)
    end(searcher, "first", GOOD)
    for trial in range(PATIENCE):
        end(searcher, str(trial), None)
    assert searcher.error is None
    end(searcher, "last", {"failed": "RuntimeError: the device is gone"})
    assert searcher.error == f"trial {PATIENCE + 1}: RuntimeError: the device is gone"
    assert len(taken) == 1 + PATIENCE


def test_a_plan_that_was_lost_is_tried_again_under_another_timeout() -> None:
    gone, raised = (Score(float("nan"), 0.0, why) for why in (lost(60.0), "MemoryError: too large"))
    assert [final(gone, 60.0), final(gone, 90.0)] == [True, False]
    assert [final(raised, 90.0), final(Score(0.5, 0.1), 90.0)] == [True, True]


def test_of_several_workers_the_one_whose_error_can_be_mended_is_quoted() -> None:
    gone = UserExceptionWithTraceback(RuntimeError("[gloo] closed by peer\nsomewhere"), "…")
    damaged = UserExceptionWithTraceback(DamagedError("library/x: cut short"), "…")
    assert cause(WorkerGroupError("…", {0: gone, 1: damaged})) == "library/x: cut short"
    assert cause(WorkerGroupError("…", {0: gone})) == "RuntimeError: [gloo] closed by peer"
    assert cause(ControllerError(ValueError("no room"))) == "ValueError: no room"
    assert cause(KeyboardInterrupt()) == "KeyboardInterrupt"
