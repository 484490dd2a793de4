"""What Ray Tune sees of a search: a Searcher that hands out proposals, a Trainable that scores.

Import this late: it imports Ray Tune.

Tune is used for what it does well, keeping scoring actors warm and busy. It keeps no state: scores
go to our store as they are made, and a search that was cut off replays its proposals
(search/proposals.py). So its loggers, checkpoints and result files are all switched off, which
also brings its cost to about 20 ms a trial.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from search.proposals import Proposal, Proposals
from search.score import Bench, Score, Scorer
from storage.errors import EspalierError
from trainers.students.plan import Plan

_log = logging.getLogger(__name__)

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1e9",
    # Ctrl-C must reach the sweep; Tune would end the search early and call it finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Environment of the process that runs Tune."""


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Sets `QUIET` inside, and puts back what was there. Nor does Tune name trials that were lost:
    their searcher says what became of them."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    logger = logging.getLogger("ray.tune.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


RETRIES = 2
"""How often a plan whose process was lost is scored again, elsewhere."""

PATIENCE = 4
"""Plans in a row that may end without a score; one more, and it is hardly the plans' fault."""

_LOST = f"its process was lost {RETRIES + 1} times, or hung for longer than search.timeout"


def lost(timeout: float) -> str:
    """What is said of a plan that no process lived to score."""
    return f"{_LOST}, {timeout:g} s"


def final(score: Score, timeout: float) -> bool:
    """Whether a stored score stands; a plan that was lost under another timeout is tried again."""
    why = score.failed or ""
    return not why.startswith(_LOST) or why == lost(timeout)


class StatelessSearcher(Searcher):
    """A searcher of which Tune keeps nothing: what has ended is in our store, and replayed."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher at the start; ours shows progress, and no terminal pickles.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, see above."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("what has ended is in the store, and replayed")


class PlanSearcher(StatelessSearcher):
    """Hands Tune the plans whose score is not known yet.

    `known` gives the stored score of a proposal, if any; `scored` hears of every score, known or
    new, as it arrives. A plan whose process was lost is handed out again, `RETRIES` times; Tune's
    own retries take a process that is lost as its next trial begins for two failures, and end the
    trial at the second. A plan that ends without a score fails alone, unless none had a score
    before or `PATIENCE` plans in a row had none. After that, or an EspalierError of a trial or of
    `scored`, no further plan is handed out, and `error` says why. Several runs of Tune may follow
    one another.
    """

    def __init__(
        self,
        proposals: Proposals,
        known: Callable[[Proposal], Score | None],
        scored: Callable[[Proposal, Score], None],
        timeout: float,
    ) -> None:
        """`timeout`: seconds after which a trial hangs."""
        super().__init__()
        self._proposals = proposals
        self._known = known
        self._scored = scored
        self._running: dict[str, Proposal] = {}
        self._waiting: Proposal | None = None
        self._again: deque[Proposal] = deque()
        self._losses: Counter[int] = Counter()
        """How often the process of a proposal was lost."""
        self._lost = lost(timeout)
        self._whole = False
        """Whether any plan had a score."""
        self._in_a_row = 0
        """Plans without one, since the last that had one."""
        self.error: str | None = None

    def stop(self, why: str) -> None:
        """Hand out no further plan; the first reason counts."""
        self.error = self.error or why

    def advance(self) -> bool:
        """Take in known scores up to the next plan that must be scored; whether there is one."""
        if self._waiting is None and self._again:
            self._waiting = self._again.popleft()
        while self._waiting is None and self.error is None:
            proposal = self._proposals.next()
            if proposal is None:
                return False
            score = self._known(proposal)
            if score is None:
                self._waiting = proposal
            else:
                self._take(proposal, score)
        return self.error is None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.error is not None:
            return str(Searcher.FINISHED)
        if not self.advance():
            # None asks again once a running trial has ended.
            return str(Searcher.FINISHED) if self._proposals.finished else None
        assert self._waiting is not None
        self._running[trial_id], self._waiting = self._waiting, None
        return {"plan": self._running[trial_id].plan.to_json()}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        proposal = self._running.pop(trial_id)
        if error or result is None:
            self._losses[proposal.number] += 1
            if self._losses[proposal.number] <= RETRIES:
                self._again.append(proposal)
                return
            result = {"failed": self._lost}
        if "broken" in result:
            self.stop(f"trial {proposal.number}: {result['broken']}")
        elif "failed" in result:
            self._in_a_row += 1
            if self._whole and self._in_a_row <= PATIENCE:
                self._take(proposal, Score(math.nan, 0.0, result["failed"]))
            else:
                self.stop(f"trial {proposal.number}: {result['failed']}")
        else:
            score = score_from_json(result["score"].encode())
            assert score is not None, result
            self._in_a_row = 0
            self._take(proposal, score)

    def _take(self, proposal: Proposal, score: Score) -> None:
        self._whole |= score.failed is None
        self._proposals.tell(proposal.number, score.fidelity_loss, score.costs)
        try:
            self._scored(proposal, score)
        except EspalierError as error:
            # Tune would take it for a failure of the trial, and go on.
            self.stop(str(error))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial has one result, which on_trial_complete is given too."""


class ScoringActor(tune.Trainable):
    """Scores one plan a trial; models stay loaded from trial to trial."""

    def setup(self, config: dict[str, Any], bench: Bench, timeout: float) -> None:
        """`timeout`: seconds after which a score, with what must be loaded for it, hangs."""
        self._bench, self._timeout = bench, timeout
        self._plan = Plan.from_json(config["plan"])
        self._scorer: Scorer | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._plan = Plan.from_json(new_config["plan"])
        return True

    def step(self) -> dict[str, Any]:
        # Ends this process, which Tune sees; then the plan is scored again by another.
        faulthandler.dump_traceback_later(self._timeout, exit=True)
        try:
            self._scorer = self._scorer or self._bench.open()
            score = self._scorer.score(self._plan)
            # Stored here, not by the driver: actors wait for the store side by side.
            stored = score_json(score)
            self._scorer.store.write(self._bench.key(self._plan), stored)
        except EspalierError as error:
            # What the user can mend travels as a sentence; Tune would wrap it in its own trace.
            return {"broken": str(error), "done": True}
        except Exception as error:  # such as a GPU's memory that one plan does not fit into
            _log.exception("scoring %s", self._plan.digest)
            said = str(error).strip().splitlines() or [""]
            return {"failed": f"{type(error).__name__}: {said[0]}", "done": True}
        finally:
            faulthandler.cancel_dump_traceback_later()
        # As it is stored, because Tune takes apart what is nested.
        return {"score": stored.decode(), "done": True}


def score_json(score: Score) -> bytes:
    """A score as it is stored; JSON has no NaN."""
    loss = score.fidelity_loss if math.isfinite(score.fidelity_loss) else None
    return json.dumps({**score._asdict(), "fidelity_loss": loss}).encode()


def score_from_json(content: bytes) -> Score | None:
    """What `score_json` wrote, or None."""
    try:
        read = json.loads(content)
        loss, costs = read["fidelity_loss"], dict(read.get("costs", {}))
        seconds = float(read["seconds"])
        return Score(math.nan if loss is None else float(loss), seconds, read.get("failed"), costs)
    except (ValueError, TypeError, KeyError):
        return None
