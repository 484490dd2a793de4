"""How many replacements a GPU has room for, found before any is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.store import StoreOptions, open_store
from trainers.estimate import USED, Pictures, library_memory
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import LibraryError
from trainers.placement import Share
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan


@dataclass(frozen=True)
class Room:
    """What a worker has, and what pictures are to it."""

    memory: int
    """Bytes of its share of a GPU."""
    pictures: Pictures


def find_room(url: str, options: StoreOptions | None, encoding: str, share: Share) -> Room:
    """Asks the GPU that Ray gives a worker of this share."""
    import ray

    found: Room = ray.get(
        ray.remote(_look)
        .options(num_cpus=share.num_cpus, num_gpus=share.num_gpus)
        .remote(url, options, encoding, share.num_gpus)
    )
    return found


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


def _look(url: str, options: StoreOptions | None, encoding: str, part: float) -> Room:
    import torch

    from trainers.data.latents import open_latents

    latents = open_latents(open_store(url, options, patient=True), encoding)
    rows, columns = latents.grid
    longest = max(int(shard.mask.sum(1).max()) for shard in latents.shards)
    memory = torch.cuda.get_device_properties(0).total_memory
    return Room(int(part * memory), Pictures(rows * columns, longest))
