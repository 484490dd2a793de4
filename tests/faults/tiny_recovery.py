"""Recovers two finalists of the tiny teacher on a local Ray: one good, one that ends in NaN.

python -m tests.faults.tiny_recovery s3://bucket/prefix TEACHER
"""

from __future__ import annotations

import sys
from typing import Any

from search.recover import RecoverConfig, Recovery, recover_finalists
from search.tiers import Finalist
from storage.store import Store, StoreOptions, open_store
from tests.search.test_recover import BROKEN, GOOD, STEPS, plan_with, put_latents, put_replacements
from tests.trainers.small import local_ray
from trainers.probe import ProbeConfig
from trainers.schedule import PhaseSpace, ScheduleSpace
from trainers.teacher import Teacher, open_teacher


def prepare(store: Store, teacher: Teacher) -> None:
    """Puts what recoveries start from."""
    put_latents(store)
    put_replacements(store, teacher)


def recover_tiny(
    store: Store, teacher: Teacher, progress: Any = None, **settings: Any
) -> list[Recovery]:
    """`settings` are RecoverConfig's, where they differ."""
    phases = (
        PhaseSpace(loss="span", steps=20, lr=1e-3, batch_size=4, magnitude=0),
        PhaseSpace(loss="velocity", train="all", steps=STEPS - 20, lr=1e-3, batch_size=4),
    )
    chosen = {"finalists": 2, "schedules": 1, "keep": 1, "checkpoint_every": 10, **settings}
    config = RecoverConfig(space=ScheduleSpace(phases=phases), **chosen)
    with local_ray():
        return recover_finalists(
            [
                Finalist("half", 0, plan_with(GOOD), 1.0),
                Finalist("half", 1, plan_with(BROKEN), 2.0),
            ][: config.finalists],
            sweep="tiny",
            teacher=teacher,
            store=store,
            options=StoreOptions(),
            encoding="encoded/tiny",
            replacements={GOOD: "library/tiny/good", BROKEN: "library/tiny/broken"},
            config=config,
            accelerator="cpu",
            probe=ProbeConfig(pictures=2, timesteps=2),
            seed=5,
            progress=progress,
        )


if __name__ == "__main__":
    recover_tiny(open_store(sys.argv[1]), open_teacher(sys.argv[2]))
