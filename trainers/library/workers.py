"""Makes what a library lacks, in groups that are spread over Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.store import Store, StoreOptions
from trainers.library.config import LibraryConfig
from trainers.library.crew import Crew, Interruption
from trainers.library.groups import grouped, steps_of
from trainers.library.library import (
    LibraryError,
    read_meta,
    replacement_prefix,
)
from trainers.library.room import find_room, largest_group
from trainers.library.worker import LibraryWorker
from trainers.placement import Accelerator, share_of
from trainers.probe import ProbeConfig
from trainers.progress import Progress, silent
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher


@dataclass(frozen=True)
class LibraryReport:
    """What one call of `train_library` found and did."""

    prefixes: dict[BlockPlan, str]
    """Where each usable replacement lives."""
    trained: int
    """Replacements trained now, the failed ones included."""
    measured: int
    """The same of those that are cut from the teacher and only measured."""
    reused: int
    """Replacements that were there already, failures included."""
    failed: dict[BlockPlan, str] = field(default_factory=dict)
    """Replacements that were dropped or whose workers kept ending, and why."""
    ridged: tuple[BlockPlan, ...] = ()
    """Replacements of which a linear map's fit was singular."""
    set_back: tuple[BlockPlan, ...] = ()
    """Replacements whose rate was halved, after a spike or a step that was not finite."""
    interruptions: tuple[Interruption, ...] = ()
    """What happened to workers, and what it cost."""


def train_library(
    teacher: Teacher,
    blocks: Sequence[BlockPlan],
    store: Store,
    encoding: str,
    config: LibraryConfig,
    sweep: str,
    *,
    options: StoreOptions | None = None,
    probe: ProbeConfig | None = None,
    workers: int = 1,
    accelerator: Accelerator = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> LibraryReport:
    """Train the replacements among `blocks` that are not stored yet, and measure those that are cut
    from the teacher; untouched blocks need none.

    `encoding` is the prefix of the latents. Each of `workers` actors opens teacher, latents and
    store (by its URL and `options`) once and takes groups until none is left. A group is stored
    when it is finished, and its replacements save checkpoints before: a lost worker or a cut-off
    run of the same `sweep`, a name, loses only the steps since. What a replacement becomes does not
    depend on any of it; its last bits may, on how many threads a worker has.
    Raises LibraryError when none came through.
    """
    progress = progress or silent()
    wanted = list(dict.fromkeys(block for block in blocks if not block.untouched))
    prefixes = {
        block: replacement_prefix(teacher.digest, block, config.training, encoding, seed)
        for block in wanted
    }
    known = {block: read_meta(store, prefix) for block, prefix in prefixes.items()}
    missing = [block for block in wanted if known[block] is None]
    reused = len(wanted) - len(missing)
    steps = sum(steps_of(block, config) for block in missing)
    progress.update(0, steps, made=0, reused=reused)
    lost: dict[BlockPlan, str] = {}
    interruptions: tuple[Interruption, ...] = ()
    if missing:
        import ray

        share = share_of(workers, accelerator)
        arguments = {
            "teacher": teacher, "url": store.url, "options": options, "encoding": encoding,
            "config": config, "probe": probe or ProbeConfig(), "seed": seed, "sweep": sweep,
            "share": share,
        }  # fmt: skip
        actor_class = ray.remote(LibraryWorker).options(
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            scheduling_strategy="SPREAD",
            # One thread trains, one answers how far it is.
            max_concurrency=2,
        )

        def start() -> Any:
            return actor_class.remote(**arguments)

        def report(done: int, made: int, interrupted: int) -> None:
            facts = {"interrupted": interrupted} if interrupted else {}
            progress.update(done, steps, made=made, reused=reused, **facts)

        most = config.group
        # One that is only measured also stands on the GPU, cut, until its group is through.
        if accelerator == "gpu":
            room = find_room(store, options, encoding, share)
            most = largest_group(teacher.family, teacher.config, missing, workers, config, room)
        # What a lost worker leaves is grouped anew.
        sized = config.model_copy(update={"group": most})
        crew = Crew(start, workers, store, {b: prefixes[b] for b in missing}, sized, sweep)
        crew.run(grouped(missing, workers, most), report)
        lost, interruptions = crew.failed, tuple(crew.interruptions)
        known |= {block: read_meta(store, prefixes[block]) for block in missing}
    dropped = {block: meta.failed for block, meta in known.items() if meta and meta.failed}
    failed = dropped | lost
    usable = {block: prefixes[block] for block in wanted if block not in failed}
    if lost and not usable:
        block, why = next(iter(lost.items()))
        raise LibraryError(f"no replacement could be made; of {block}: {why}")
    return LibraryReport(
        prefixes=usable,
        trained=sum(not block.untrained for block in missing),
        measured=sum(block.untrained for block in missing),
        reused=reused,
        failed=failed,
        ridged=tuple(block for block, meta in known.items() if meta and meta.ridged),
        set_back=tuple(block for block, meta in known.items() if meta and meta.setbacks),
        interruptions=interruptions,
    )
