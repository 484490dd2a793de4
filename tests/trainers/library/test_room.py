"""How many replacements are trained together follows from the memory that a worker has."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.manifest import publish, withdraw
from storage.store import Store, open_store
from tests.nodes import ROOT, machines
from tests.trainers.library.setting import ENCODING, put_latents
from tests.trainers.small import small_latents
from trainers.data.shards import EncodedMeta
from trainers.estimate import USED, Pictures, library_memory
from trainers.library import room as rooms
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import LibraryError
from trainers.library.room import Room, _opened, encoded_pictures, find_room, largest_group
from trainers.placement import Share
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan

FAMILY = FAMILIES["qwen_image"]
QWEN_IMAGE = {**FAMILY.published, "num_layers": 60}
LARGE = Pictures.of(1328, 512)
SPANS = [(i, i + length) for i in range(58) for length in (1, 2)]
BLOCKS = [BlockPlan(span=(i, i + 1), start="library", ffn=f) for i in range(20) for f in (0.5, 1.0)]
OFFERED = {
    "widths": BLOCKS,
    # Of few parameters, but with states of their own to map.
    "linear": [BlockPlan(span=s, start="library", ffn=f) for s in SPANS for f in ("linear", 0.5)],
    "projected": [
        BlockPlan(span=s, start="library", text=t) for s in SPANS for t in ("dual", "projected")
    ],
    # No two share an edge.
    "scattered": [BlockPlan(span=(i, i + 1), start="library", ffn=0.5) for i in range(0, 60, 2)],
}
SETTINGS = LibraryConfig(batch_size=64, micro_batch=2)
WORKERS = 3


def room(gib: float) -> Room:
    return Room(int(gib * 2**30), LARGE)


def needed(blocks: list[BlockPlan]) -> int:
    return sum(library_memory(FAMILY, QWEN_IMAGE, blocks, 64, 2, LARGE).values())


def largest(blocks: list[BlockPlan], room: Room, settings: LibraryConfig = SETTINGS) -> int:
    return largest_group(FAMILY, QWEN_IMAGE, blocks, WORKERS, settings, room)


@pytest.mark.parametrize("blocks", OFFERED.values(), ids=OFFERED)
@pytest.mark.parametrize("gib", [80, 139.8, 178])
def test_every_group_fits_and_larger_ones_would_not(blocks: list[BlockPlan], gib: float):
    most = largest(blocks, room(gib))

    def fullest(size: int) -> int:
        return max(map(needed, grouped(blocks, WORKERS, size)))

    assert fullest(most) <= USED * gib * 2**30
    larger = range(most + 1, SETTINGS.group + 1)
    assert all(fullest(size) > USED * gib * 2**30 for size in larger)


def test_a_group_is_never_larger_than_asked_for_nor_than_there_are():
    few = SETTINGS.model_copy(update={"group": 3})
    assert largest(BLOCKS, room(10_000), few) == 3
    assert largest(BLOCKS[:2], room(10_000)) == 2


def test_no_room_for_one_is_said_before_any_training():
    whole = SETTINGS.model_copy(update={"micro_batch": None})
    with pytest.raises(
        LibraryError, match=r"one replacement takes \d+\.\d GiB .* lower library.micro_batch"
    ):
        largest(BLOCKS, room(80), whole)


def test_what_is_only_measured_is_refused_for_no_training():
    whole = SETTINGS.model_copy(update={"micro_batch": None})
    cut = [block.model_copy(update={"start": "average"}) for block in BLOCKS]
    assert largest(cut, room(80), whole) == 1


LONGEST = max(int(shard.mask.sum(1).max()) for shard in small_latents().shards)


def test_pictures_are_those_encoded_whether_their_manifest_says_so_or_not(tmp_path: Path):
    store = open_store(str(tmp_path))
    put_latents(store)
    assert encoded_pictures(store, ENCODING) is None
    assert _opened(str(tmp_path), None, ENCODING) == Pictures(16, LONGEST)
    say_tokens(store)
    assert encoded_pictures(store, ENCODING) == Pictures(16, LONGEST)


def say_tokens(store: Store) -> None:
    """As encoding does; and no shard is there to be opened."""
    withdraw(store, ENCODING)
    meta = EncodedMeta(shards=1, pictures=20, held_out=4, image_tokens=16, text_tokens=LONGEST)
    publish(store, ENCODING, {}, meta.model_dump(mode="json"))


@pytest.mark.timeout(300)
def test_room_is_a_share_of_the_smallest_gpu_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import ray

    store, share = open_store(str(tmp_path)), Share(0.5, 0.5, 1, "cuda")
    say_tokens(store)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(rooms, "PATIENCE_SECONDS", 1.0)
    with machines(head_cpus=1) as cluster:
        large, small = (cluster.add_node(num_cpus=1, num_gpus=1).node_id for _ in range(2))
        gib = {large: 80, small: 40}
        monkeypatch.setattr(
            rooms, "_memory", lambda: gib[ray.get_runtime_context().get_node_id()] * 2**30
        )
        assert find_room(store, None, ENCODING, share) == Room(20 * 2**30, Pictures(16, LONGEST))

        there = NodeAffinitySchedulingStrategy(small, soft=False)
        holder = ray.remote(Holder).options(num_gpus=1, scheduling_strategy=there).remote()
        ray.get(holder.ready.remote())
        assert find_room(store, None, ENCODING, share).memory == 40 * 2**30


class Holder:
    """Somebody else, who has a GPU."""

    def ready(self) -> None: ...
