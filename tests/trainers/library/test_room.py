"""How many replacements are trained together follows from the memory that a worker has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from storage.store import open_store
from tests.trainers.library.setting import ENCODING, put_latents
from tests.trainers.small import small_latents
from trainers.estimate import USED, Pictures, library_memory
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import LibraryError
from trainers.library.room import Room, _look, largest_group
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


def test_room_is_a_share_of_the_gpu_and_pictures_are_those_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    put_latents(open_store(str(tmp_path)))
    longest = max(int(shard.mask.sum(1).max()) for shard in small_latents().shards)
    assert _look(str(tmp_path), None, ENCODING, 0.5) == Room(40 * 2**30, Pictures(16, longest))
