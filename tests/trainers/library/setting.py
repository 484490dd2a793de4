"""What tests of the library share: latents in a store, replacements to train, a worker to hit."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from storage import layout
from storage.checkpoint import newest_step
from storage.manifest import publish, published
from storage.store import Store
from storage.tensors import save_tensors
from tests.trainers.small import small_latents
from trainers.data.shards import CAPTIONS, TENSORS, EncodedMeta, shard_prefix
from trainers.library.config import LibraryConfig
from trainers.library.library import LOSSES, replacement_prefix
from trainers.library.library import TENSORS as BLOCK
from trainers.probe import ProbeConfig
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher

ENCODING = "encoded/test"
PROBE = ProbeConfig(pictures=2, timesteps=2)
BLOCKS = [
    BlockPlan(span=(0, 1), start="library"),
    BlockPlan(span=(2, 4), start="library", ffn=0.5),
    BlockPlan(span=(5, 5), start="library", ffn=0.5),
    BlockPlan(span=(5, 5)),
]
"""The last is untouched, and no replacement."""

LONG = LibraryConfig(steps=200, batch_size=4, group=2, checkpoint_every=20)
"""Long enough to hit a worker in the middle."""
SWEEP = "tiny"
"""For which they are trained unless another is named."""
MANY = [*BLOCKS[:3], BlockPlan(span=(3, 4), start="library")]
"""Two groups of two."""


def put_latents(store: Store) -> None:
    latents = small_latents()
    for number, shard in enumerate(latents.shards):
        tensors = {"latents": shard.latents, "embeds": shard.embeds, "mask": shard.mask}
        captions = str(list(shard.captions)).replace("'", '"').encode()
        publish(
            store,
            shard_prefix(ENCODING, number),
            {TENSORS: save_tensors(tensors), CAPTIONS: captions},
        )
    meta = EncodedMeta(shards=len(latents.shards), pictures=20, held_out=4)
    publish(store, ENCODING, {}, meta.model_dump(mode="json"))


def prefixes(teacher: Teacher, config: LibraryConfig = LONG) -> dict[BlockPlan, str]:
    """Where MANY are stored."""
    return {b: replacement_prefix(teacher.digest, b, config.training, ENCODING, 0) for b in MANY}


def trained_digests(store: Store, teacher: Teacher) -> dict[BlockPlan, tuple[str, str]]:
    """Of the weights and the losses of MANY."""
    found = {}
    for block, prefix in prefixes(teacher).items():
        manifest = published(store, prefix)
        assert manifest is not None, block
        found[block] = (manifest.files[BLOCK].sha256, manifest.files[LOSSES].sha256)
    return found


def checkpoints(store: Store) -> list[str]:
    return [key for key in store.keys("library") if "/checkpoints/" in key]


@dataclass
class Hit:
    """Sends one worker a signal, as soon as each of MANY has a checkpoint."""

    store: Store
    teacher: Teacher
    signal: signal.Signals
    pid: int | None = None
    saved: dict[BlockPlan, int] = field(default_factory=dict)
    """The checkpoints that there were."""
    facts: dict[str, float | str] = field(default_factory=dict)
    """The last ones told."""

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.facts = facts
        if self.pid is not None:
            return
        for block, prefix in prefixes(self.teacher).items():
            step = newest_step(self.store, layout.library_checkpoints(prefix, SWEEP))
            if step is None:
                return
            self.saved[block] = step
        self.pid = worker_pids()[0]
        os.kill(self.pid, self.signal)


def worker_pids() -> list[int]:
    """The processes of library workers that live."""
    import ray._private.state

    actors = ray._private.state.actors().values()
    found = [actor["Pid"] for actor in actors if actor["ActorClassName"] == "LibraryWorker"]
    return [pid for pid in found if pid and Path(f"/proc/{pid}").exists()]
