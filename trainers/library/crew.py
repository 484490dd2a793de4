"""Keeps workers busy with groups of replacements, and hands on what a lost or slow one leaves.

A worker is lost when its process or machine ends, when it takes no step for `timeout` seconds, or
when it falls behind: nothing waits, another worker is free, and what this one still needs, or the
time for which it has stood still, is more than twice what the free one would take for the whole
group. Then its process is ended and its unfinished replacements wait again; whoever is free first
goes on from their checkpoints. A worker whose machine will be taken away saves its replacements
first and is given nothing more. Another process is started only where more waits than workers do.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage import layout
from storage.checkpoint import newest_step
from storage.errors import EspalierError
from storage.manifest import published, withdraw
from storage.store import Store
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped, steps_of, work
from trainers.library.library import LibraryError
from trainers.notice import going_machines
from trainers.students.plan import BlockPlan

POLL_SECONDS = 0.5

LOOK_SECONDS = 1.0
"""Between two looks for machines that will be taken away; some clouds say so 30 s before."""

PATIENCE_SECONDS = 30.0
"""Nobody has fallen behind by less."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interruption:
    """Replacements that lost their worker before they were stored."""

    blocks: tuple[BlockPlan, ...]
    why: str
    """What happened to the worker."""
    at: int
    """The step it was last seen at."""
    on_from: int
    """The step from which the replacement with the oldest checkpoint goes on."""

    def __str__(self) -> str:
        return (
            f"{', '.join(map(str, self.blocks))}: the worker {self.why}, last seen at step "
            f"{self.at}; gone on from step {self.on_from}"
        )


@dataclass(eq=False)
class _Worker:
    actor: Any
    starting: Any
    """What it answers when it is up; None afterwards."""
    group: Sequence[BlockPlan] = ()
    call: Any = None
    """What it answers when the group is stored."""
    asked: Any = None
    """How far it is, if it has not answered yet."""
    given: float = 0.0
    """When it was given its group."""
    begun: tuple[float, int] | None = None
    """When it was first seen training, and at which step it then was."""
    first: int = 0
    """The step that the group went on from."""
    done: int = 0
    """Steps of the group, when it last answered."""
    moved: float = 0.0
    """When it was last seen to have taken a step."""
    machine: str | None = None
    """Where it is, when it is up."""
    told: bool = False
    """Whether it was told that its machine goes."""
    pace: float | None = None
    """Seconds that it took for a unit of work of its last group, see groups.work."""

    @property
    def free(self) -> bool:
        return self.starting is None and not self.group


class Crew:
    """The workers of one run, and what they are at."""

    def __init__(
        self,
        start: Callable[[], Any],
        size: int,
        store: Store,
        prefixes: Mapping[BlockPlan, str],
        config: LibraryConfig,
        sweep: str,
    ) -> None:
        """`start` makes a LibraryWorker as a Ray actor; at most `size` are up. `prefixes`: where
        each replacement is stored. `sweep`: the name of the one that they are made for."""
        self.failed: dict[BlockPlan, str] = {}
        """Replacements whose workers kept ending, and how."""
        self.interruptions: list[Interruption] = []
        self._start, self._size = start, size
        self._store, self._prefixes, self._config = store, prefixes, config
        self._sweep = sweep
        self._workers: list[_Worker] = []
        self._waiting: deque[Sequence[BlockPlan]] = deque()
        self._steps = dict.fromkeys(prefixes, 0)
        self._stored: set[BlockPlan] = set()
        self._saved: dict[BlockPlan, int] = {}
        self._losses: dict[BlockPlan, int] = {}
        self._lost_at_start = 0
        self._looked = 0.0
        """When the cluster was last asked for machines that go."""

    def run(
        self,
        groups: Sequence[Sequence[BlockPlan]],
        report: Callable[[int, int, int], None],
    ) -> None:
        """Make and store all groups. `report` gets the steps done, the replacements stored, and
        how often some were interrupted.

        Raises at once what the data or the store is at fault for; LibraryError when workers end
        again and again before they are up.
        """
        import ray

        self._waiting.extend(groups)
        try:
            while self._waiting or any(worker.group for worker in self._workers):
                self._staff()
                self._assign()
                self._listen()
                self._give_notice()
                self._end_the_slow()
                report(sum(self._steps.values()), len(self._stored), len(self.interruptions))
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)

    def _staff(self) -> None:
        """Start as many workers as groups wait for, and there may be."""
        able = sum(not worker.group for worker in self._workers)
        for _ in range(min(len(self._waiting) - able, self._size - len(self._workers))):
            actor = self._start()
            self._workers.append(_Worker(actor, starting=actor.machine.remote()))

    def _assign(self) -> None:
        """Give waiting groups to free workers, the quickest first."""
        free = [worker for worker in self._workers if worker.free]
        for worker in sorted(free, key=lambda worker: worker.pace or 0.0):
            if not self._waiting:
                break
            worker.group, worker.asked = self._waiting.popleft(), None
            named = [(block, self._prefixes[block]) for block in worker.group]
            worker.call = worker.actor.train.remote(named)
            worker.given = worker.moved = time.monotonic()
            worker.begun, worker.first, worker.done = None, 0, 0

    def _listen(self) -> None:
        """Wait a moment for what workers have to say."""
        import ray

        awaited = [w.call or w.starting for w in self._workers if not w.free]
        if awaited:
            ray.wait(awaited, timeout=POLL_SECONDS)
        # The free ones too: a lost one must be given nothing.
        up = [worker for worker in self._workers if worker.starting is None]
        for worker in up:
            worker.asked = worker.asked or worker.actor.steps.remote()
        if up:
            asked = [worker.asked for worker in up]
            ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
        for worker in list(self._workers):
            try:
                self._hear(worker)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error, EspalierError):
                    raise
                # The process is well, but what is left of the training in it is not.
                self._lose(worker, f"failed with {type(error.cause).__name__}: {error.cause}")
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise
                self._lose(worker, "was lost")
            except ray.exceptions.RayError as error:
                self._lose(worker, f"was lost ({type(error).__name__})")

    def _hear(self, worker: _Worker) -> None:
        import ray

        references = [r for r in (worker.starting, worker.call, worker.asked) if r is not None]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        answers = {reference: ray.get(reference) for reference in ready}
        now = time.monotonic()
        if worker.starting in answers:
            worker.machine = answers[worker.starting]
            worker.starting, self._lost_at_start = None, 0
        if worker.call in answers and not answers[worker.call]:
            self._lose(worker, "left because its machine goes")
            return
        if worker.call in answers:
            if work(worker.group):
                steps = max(1, self._config.steps - worker.first)
                worker.pace = (now - worker.given) / steps / work(worker.group)
            self._note_stored(worker.group)
            worker.group, worker.call = (), None
        elif worker.asked in answers and worker.group and answers[worker.asked]:
            first, done = answers[worker.asked]
            if worker.begun is None:
                worker.begun, worker.first, worker.moved = (now, done), first, now
            elif done > worker.done:
                worker.moved = now
            worker.done = done
            self._steps |= dict.fromkeys(worker.group, done)
        if worker.asked in answers:
            worker.asked = None

    def _give_notice(self) -> None:
        """Let workers save whose machine will be taken away, and give them nothing more."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, going = time.monotonic(), going_machines()
        for worker in [w for w in self._workers if w.machine in going]:
            if worker.free:
                self._lose(worker, "")
            elif not worker.told:
                worker.told = True
                worker.actor.leave.remote()

    def _end_the_slow(self) -> None:
        now = time.monotonic()
        busy = [worker for worker in self._workers if worker.group]
        for worker in busy:
            if now - worker.moved > self._config.timeout:
                self._lose(worker, f"took no step for {now - worker.moved:.0f} s")
                return
        paces = [w.pace for w in self._workers if w.free and w.pace is not None]
        # One that only measures takes no steps that its pace would show in.
        training = [worker for worker in busy if work(worker.group)]
        if self._waiting or not paces or not training:
            return
        slowest = max(training, key=lambda worker: _needs(worker, self._config.steps, now))
        needs = _needs(slowest, self._config.steps, now)
        whole = min(paces) * work(slowest.group) * self._config.steps
        if needs > max(2 * whole, PATIENCE_SECONDS):
            self._lose(slowest, "fell behind")

    def _lose(self, worker: _Worker, why: str) -> None:
        import ray

        ray.kill(worker.actor)
        self._workers.remove(worker)
        if worker.group:
            self._hand_on(worker, why)
        elif worker.starting is not None:
            self._lost_at_start += 1
            if self._lost_at_start > self._config.retries:
                raise LibraryError(
                    f"{self._lost_at_start} workers in a row ended before they had loaded the "
                    "teacher; see Ray's logs for why, such as too little memory"
                )

    def _hand_on(self, worker: _Worker, why: str) -> None:
        """Let what the worker has not stored wait again, from its checkpoints."""
        left = []
        for block in worker.group:
            if published(self._store, self._prefixes[block]) is None:
                left.append(block)
            else:
                withdraw(self._store, self._checkpoints(block))
                self._note_stored([block])
        for block in left:
            saved = newest_step(self._store, self._checkpoints(block)) or 0
            gained = saved > self._saved.get(block, 0)
            self._losses[block] = 1 if gained else self._losses.get(block, 0) + 1
            self._saved[block] = self._steps[block] = saved
        for block in [b for b in left if self._losses[b] > self._config.retries]:
            left.remove(block)
            self._give_up(block, why)
        if not left:
            return
        on_from = min(self._saved[block] for block in left)
        self.interruptions.append(Interruption(tuple(left), why, worker.done, on_from))
        _log.warning("%s", self.interruptions[-1])
        alone = [block for block in left if self._losses[block] == self._config.retries]
        together = [block for block in left if block not in alone]
        if together:
            free = sum(worker.free for worker in self._workers)
            self._waiting.extend(grouped(together, max(1, free), self._config.group))
        self._waiting.extend([block] for block in alone)

    def _give_up(self, block: BlockPlan, why: str) -> None:
        withdraw(self._store, self._checkpoints(block))
        self._steps[block] = steps_of(block, self._config)
        when = f"between step {self._saved[block]} and its next checkpoint"
        if block.untrained:
            when = "while it was measured"
        self.failed[block] = (
            f"its worker ended {self._losses[block]} times in a row {when}; the last one {why}"
        )
        _log.warning("%s failed and is left out: %s", block, self.failed[block])

    def _checkpoints(self, block: BlockPlan) -> str:
        return layout.library_checkpoints(self._prefixes[block], self._sweep)

    def _note_stored(self, blocks: Sequence[BlockPlan]) -> None:
        self._stored.update(blocks)
        self._steps |= {block: steps_of(block, self._config) for block in blocks}


def _needs(worker: _Worker, steps: int, now: float) -> float:
    """Seconds until a worker will have taken its last step, by its own pace; at least as many as it
    has stood still."""
    still = now - worker.moved
    if worker.begun is None or worker.done <= worker.begun[1]:
        return still
    begun, first = worker.begun
    return max(still, (worker.moved - begun) / (worker.done - first) * (steps - worker.done))
