"""Spreads the measuring of a teacher over Ray actors that share the calibration pictures."""

from __future__ import annotations

from typing import Any

from search.analyse import Analysis, save_analysis
from search.redundancy import Measurer
from search.sweep import Sweep
from storage.store import StoreOptions, open_store
from trainers.data.latents import open_latents
from trainers.placement import Share, share_of
from trainers.progress import Progress
from trainers.teacher import Teacher

POLL_SECONDS = 0.5


def measure_apart(sweep: Sweep, progress: Progress, memory: int) -> None:
    """Measures the sweep's teacher on `analyse.workers` actors, each with `memory` bytes of its
    machine's, and publishes what they find.

    A block's sums meet at one of them, block after block, so that the object store never holds
    more than those of a few blocks.
    """
    import ray

    config, parts = sweep.config.analyse, sweep.config.analyse.workers
    share = share_of(parts, sweep.config.accelerator)
    actor_class = ray.remote(MeasuringActor).options(
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
        memory=memory,
        scheduling_strategy="SPREAD",
        max_concurrency=2,  # one thread measures, one answers how far it is
    )
    actors: list[Any] = [
        actor_class.remote(
            sweep.teacher, sweep.store.url, sweep.config.store, sweep.encoded_prefix, share,
            candidates=sweep.analysed, config=config, seed=sweep.config.seed,
            part=part, parts=parts,
        )
        for part in range(parts)
    ]  # fmt: skip

    def wait(references: list[Any]) -> list[Any]:
        left = references
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
            at = ray.get([actor.done.remote() for actor in actors])
            progress.update(sum(done for done, _ in at), sum(total for _, total in at))
        return references

    try:
        ray.get(wait([actor.gather.remote() for actor in actors]))
        solved: list[Any] = []
        for block in range(sweep.teacher_blocks):
            sums = [actor.take.remote(block) for actor in actors]
            solved.append(actors[block % parts].solve.remote(block, *sums))
            if len(solved) > parts:
                ray.wait([solved[-parts]])
        effects = wait([actor.effects.remote(*solved) for actor in actors])
        samples = [actor.samples.remote() for actor in actors]
        ray.get(actors[0].publish.remote(sweep.analysis_prefix, parts, *solved, *effects, *samples))
    finally:
        for actor in actors:
            ray.kill(actor)


class MeasuringActor(Measurer):
    """A measurer in a process of its own; a Ray actor."""

    def __init__(
        self,
        teacher: Teacher,
        url: str,
        options: StoreOptions,
        encoded: str,
        share: Share,
        **arguments: Any,
    ) -> None:
        share.prepare()
        self._store = open_store(url, options, patient=True)
        self._at = (0, 0)
        latents = open_latents(self._store, encoded)
        transformer = teacher.transformer(device=share.device)
        super().__init__(transformer, teacher.family, latents, **arguments, progress=self)

    def done(self) -> tuple[int, int]:
        """Batches measured, of how many."""
        return self._at

    def update(self, done: int, total: int, **facts: float | str) -> None:
        """The worker is its own measuring's progress."""
        self._at = done, total

    def publish(self, out: str, parts: int, *found: Any) -> None:
        """Concludes from what all workers found, and publishes it."""
        blocks = len(found) - 2 * parts
        solved, effects, samples = found[:blocks], found[blocks:-parts], found[-parts:]
        analysis: Analysis = self.conclude(solved, effects, samples)
        save_analysis(self._store, out, analysis)
