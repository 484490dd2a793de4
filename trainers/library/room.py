"""How many replacements a GPU has room for, found before any is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.manifest import published
from storage.store import Store, StoreOptions, open_store
from trainers.data.shards import EncodedMeta
from trainers.estimate import USED, Pictures, library_memory
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import LibraryError
from trainers.placement import Share
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan

PATIENCE_SECONDS = 60.0
"""How long a machine is waited for whose GPUs are in use, once another has answered."""


@dataclass(frozen=True)
class Room:
    """What a worker has, and what pictures are to it."""

    memory: int
    """Bytes of its share of a GPU."""
    pictures: Pictures


def find_room(store: Store, options: StoreOptions | None, encoding: str, share: Share) -> Room:
    """Asks a GPU of every machine that Ray has one free on, and takes the smallest: those of one
    machine should be alike, and a machine that joins later should have no smaller ones."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Soft: what a machine is asked that has just left, another answers.
    asked = [
        ray.remote(max_calls=1)(_memory)  # or its idle process would keep some of the GPU
        .options(
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
        )
        .remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU")
    ]
    ray.wait(asked)
    free, taken = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_SECONDS)
    for reference in taken:
        ray.cancel(reference)
    pictures = encoded_pictures(store, encoding)
    if pictures is None:
        opened = ray.remote(max_calls=1)(_opened).options(
            num_cpus=share.num_cpus, num_gpus=share.num_gpus
        )
        pictures = ray.get(opened.remote(store.url, options, encoding))
    return Room(int(share.num_gpus * min(ray.get(free))), pictures)


def encoded_pictures(store: Store, encoding: str) -> Pictures | None:
    """What the encoding's manifest says of its pictures; of one of the first version, None."""
    manifest = published(store, encoding)
    if manifest is None:
        return None
    meta = EncodedMeta.model_validate(manifest.meta)
    if meta.image_tokens is None or meta.text_tokens is None:
        return None
    return Pictures(meta.image_tokens, meta.text_tokens)


def largest_group(
    family: Family,
    config: Config,
    blocks: Sequence[BlockPlan],
    workers: int,
    settings: LibraryConfig,
    room: Room,
) -> int:
    """How many replacements a group of `blocks` may have, `settings.group` at most, so that each of
    the groups that they are dealt into has room on a worker.

    LibraryError when one that is trained is too large alone.
    """
    offered = int(USED * room.memory)

    def needed(group: Sequence[BlockPlan]) -> int:
        memory = library_memory(
            family, config, group, settings.batch_size, settings.micro_batch, room.pictures
        )
        return sum(memory.values())

    # What a group takes depends on more than how many it has: on widths and kinds, and on how many
    # edges its spans share. So larger ones may fit where smaller ones do not.
    for most in range(min(settings.group, len(blocks)), 0, -1):
        if all(needed(group) <= offered for group in grouped(blocks, workers, most)):
            return most
    # One that is only measured takes less than its training would.
    largest = max((needed([block]) for block in blocks if not block.untrained), default=0)
    if largest > offered:
        raise LibraryError(
            f"library: one replacement takes {largest / 2**30:.1f} GiB with the teacher, and a "
            f"worker has {offered / 2**30:.1f} of its GPU for it; lower library.micro_batch, then "
            "library.batch_size, or give each worker a larger GPU or one of its own"
        )
    return 1


def _memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _opened(url: str, options: StoreOptions | None, encoding: str) -> Pictures:
    """Of an encoding that does not say it; on a machine that trains, which needs a copy anyhow."""
    from trainers.data.latents import open_latents

    latents = open_latents(open_store(url, options, patient=True), encoding)
    rows, columns = latents.grid
    longest = max(int(shard.mask.sum(1).max()) for shard in latents.shards)
    return Pictures(rows * columns, longest)
