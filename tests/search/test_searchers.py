"""What Tune asks of its searchers beside suggestions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TextIO

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from search.budget import Target
from search.proposals import Proposal, Proposals
from search.racing import RaceSearcher
from search.score import Score
from search.study import PlanSearcher, score_json
from storage.errors import StoreError
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
        PlanSearcher(proposals, lambda _: None, lambda *_: shown.update(1, 2)),
        RaceSearcher([], lambda *_: None, lambda _: {}, shown),  # type: ignore[arg-type]
    ]
    for searcher in searchers:
        cloudpickle.dumps(searcher)


def test_a_result_that_cannot_be_kept_ends_the_search_with_the_reason() -> None:
    def full(proposal: Proposal, score: Score) -> None:
        raise StoreError("the disk is full")

    proposals = Proposals(make_space(), [Target("50pct", 45)], trials=2, exact=1, lag=1, seed=0)
    searcher = PlanSearcher(proposals, lambda _: None, full)
    assert isinstance(searcher.suggest("a"), dict)
    searcher.on_trial_complete("a", {"score": score_json(Score(0.5, 0.1)).decode()})
    assert searcher.error == "the disk is full"
    assert searcher.suggest("b") == Searcher.FINISHED
