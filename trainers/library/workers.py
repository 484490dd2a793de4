"""Spreads the library's training over Ray actors, group by group, and stores what is finished."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage.manifest import publish
from storage.store import Store, StoreOptions, open_store
from storage.tensors import save_tensors
from trainers.library.config import LibraryConfig
from trainers.library.library import (
    LOSSES,
    TENSORS,
    ReplacementMeta,
    library_block,
    read_meta,
    replacement_prefix,
)
from trainers.placement import Accelerator, Share, share_of
from trainers.probe import FidelityProbe, ProbeConfig, shared_probe
from trainers.progress import Progress, silent
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher

if TYPE_CHECKING:
    from trainers.data.latents import Latents
    from trainers.library.train import Trained

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class LibraryReport:
    """What one call of `train_library` found and did."""

    prefixes: dict[BlockPlan, str]
    """Where each usable replacement lives; keys start from the library."""
    trained: int
    """Replacements trained now, the failed ones included."""
    reused: int
    """Replacements that were there already, failures included."""
    failed: dict[BlockPlan, str] = field(default_factory=dict)
    """Replacements that training dropped, and why."""
    ridged: tuple[BlockPlan, ...] = ()
    """Replacements of which a linear map's fit was singular."""


def train_library(
    teacher: Teacher,
    blocks: Sequence[BlockPlan],
    store: Store,
    encoding: str,
    config: LibraryConfig,
    *,
    options: StoreOptions | None = None,
    probe: ProbeConfig | None = None,
    workers: int = 1,
    accelerator: Accelerator = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> LibraryReport:
    """Train the replacements among `blocks` that are not stored yet; untouched blocks need none.

    `encoding` is the prefix of the latents. Each of `workers` actors opens teacher, latents and
    store (by its URL and `options`) once and takes groups until none is left; a group is stored
    when it is finished, so a cut-off run loses at most one group a worker.
    """
    progress = progress or silent()
    wanted = list(dict.fromkeys(library_block(block) for block in blocks if not block.untouched))
    prefixes = {
        block: replacement_prefix(teacher.digest, block, config.training, encoding, seed)
        for block in wanted
    }
    known = {block: read_meta(store, prefix) for block, prefix in prefixes.items()}
    missing = [block for block in wanted if known[block] is None]
    reused = len(wanted) - len(missing)
    progress.update(0, len(missing) * config.steps, trained=0, reused=reused)
    if missing:
        arguments = {
            "teacher": teacher, "url": store.url, "options": options, "encoding": encoding,
            "config": config, "probe": probe or ProbeConfig(), "seed": seed,
        }  # fmt: skip
        groups = grouped(missing, workers, config.group)
        _run(groups, prefixes, arguments, workers, accelerator, progress, reused)
        known |= {block: read_meta(store, prefixes[block]) for block in missing}
    failed = {block: meta.failed for block, meta in known.items() if meta and meta.failed}
    return LibraryReport(
        prefixes={block: prefixes[block] for block in wanted if block not in failed},
        trained=len(missing),
        reused=reused,
        failed=failed,
        ridged=tuple(block for block, meta in known.items() if meta and meta.ridged),
    )


def grouped(blocks: Sequence[BlockPlan], workers: int, largest: int) -> list[list[BlockPlan]]:
    """Groups of equal size, as few as keep all workers busy, none above `largest`.

    Blocks are dealt out by the end of their span: a group's teacher pass ends at its last span.
    """
    per_worker = math.ceil(len(blocks) / workers)
    rounds = math.ceil(per_worker / largest)
    count = min(len(blocks), workers * rounds)
    ordered = sorted(blocks, key=lambda b: (b.span[1], b.span[0], b.kept, b.text))
    edges = [i * len(ordered) // count for i in range(count + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(edges)]


def _run(
    groups: Sequence[Sequence[BlockPlan]],
    prefixes: Mapping[BlockPlan, str],
    arguments: dict[str, Any],
    workers: int,
    accelerator: Accelerator,
    progress: Progress,
    reused: int,
) -> None:
    import ray

    share = share_of(workers, accelerator)
    actor_class = ray.remote(LibraryWorker).options(
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
        scheduling_strategy="SPREAD",
        # One thread trains, one answers how far it is.
        max_concurrency=2,
        # A lost machine costs its group's work, once: the actor starts again and so does the call.
        max_restarts=1,
        max_task_retries=1,
    )
    steps = arguments["config"].steps
    total = sum(len(group) for group in groups) * steps
    waiting = list(groups)[::-1]
    actors = [
        actor_class.remote(share=share, **arguments) for _ in range(min(workers, len(groups)))
    ]
    try:
        running: dict[Any, tuple[Any, Sequence[BlockPlan]]] = {}
        for actor in actors:
            group = waiting.pop()
            running[actor.train.remote([(b, prefixes[b]) for b in group])] = (actor, group)
        trained = 0
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in ready:
                actor, group = running.pop(reference)
                ray.get(reference)
                trained += len(group)
                if waiting:
                    group = waiting.pop()
                    running[actor.train.remote([(b, prefixes[b]) for b in group])] = (actor, group)
            at = ray.get([actor.steps_done.remote() for actor, _ in running.values()])
            under_way = sum(
                done * len(group) for done, (_, group) in zip(at, running.values(), strict=True)
            )
            progress.update(trained * steps + under_way, total, trained=trained, reused=reused)
    finally:
        for actor in actors:
            ray.kill(actor)


class LibraryWorker:
    """One OS process that trains groups of replacements and stores them; a Ray actor."""

    def __init__(
        self,
        teacher: Teacher,
        url: str,
        options: StoreOptions | None,
        encoding: str,
        config: LibraryConfig,
        probe: ProbeConfig,
        seed: int,
        share: Share,
    ) -> None:
        from trainers.data.latents import open_latents

        share.prepare()
        self._store = open_store(url, options)
        self._config, self._seed = config, seed
        self._family = teacher.family
        self._teacher = teacher.transformer(device=share.device)
        self._latents: Latents = open_latents(self._store, encoding)
        self._probe: FidelityProbe = shared_probe(
            self._store, teacher, self._teacher, self._latents, encoding, probe, seed
        )
        self._done = 0

    def steps_done(self) -> int:
        """Optimizer steps of the group that is under way."""
        return self._done

    def update(self, done: int, total: int, **facts: float | str) -> None:
        """The worker is its own training's progress."""
        self._done = done

    def train(self, group: Sequence[tuple[BlockPlan, str]]) -> None:
        """Train and store a group of replacements, each under its own prefix."""
        from trainers.evaluate import replacement_damages
        from trainers.library.train import train_replacements

        self._done, started = 0, time.monotonic()
        trained = train_replacements(
            self._teacher,
            self._family,
            [block for block, _ in group],
            self._latents,
            self._config,
            self._seed,
            self,
        )
        seconds = (time.monotonic() - started) / len(group)
        whole = {block: t.module for block, t in trained.items() if t.failed is None}
        damages = replacement_damages(self._teacher, self._family, whole, self._probe)
        for block, prefix in group:
            self._publish(prefix, trained[block], damages.get(block), seconds)

    def _publish(self, prefix: str, trained: Trained, damage: float | None, seconds: float) -> None:
        tail = trained.losses[-max(1, len(trained.losses) // 10) :]
        failed = trained.failed
        if damage is not None and not math.isfinite(damage):
            damage, failed = None, "its damage was not finite"
        meta = ReplacementMeta(
            block=trained.block,
            damage=damage,
            loss=None if failed else sum(tail) / len(tail),
            failed=failed,
            ridged=trained.ridged,
            parameters=sum(p.numel() for p in trained.module.parameters()),
            seconds=seconds,
            training=self._config.training,
        )
        losses = [loss if math.isfinite(loss) else None for loss in trained.losses]
        files = {LOSSES: json.dumps(losses).encode()}
        if failed is None:
            files[TENSORS] = save_tensors(trained.module.state_dict())
        publish(self._store, prefix, files, meta.model_dump(mode="json"))
