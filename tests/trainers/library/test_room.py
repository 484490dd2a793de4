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
from trainers.library.library import LibraryError
from trainers.library.room import Room, _look, largest_group
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan

FAMILY = FAMILIES["qwen_image"]
QWEN_IMAGE = {**FAMILY.published, "num_layers": 60}
LARGE = Pictures.of(1328, 512)
BLOCKS = [BlockPlan(span=(i, i + 1), start="library", ffn=f) for i in range(20) for f in (0.5, 1.0)]
SETTINGS = LibraryConfig(batch_size=32, micro_batch=2)


def room(gib: float) -> Room:
    return Room(int(gib * 2**30), LARGE)


def needed(blocks: list[BlockPlan]) -> int:
    return sum(library_memory(FAMILY, QWEN_IMAGE, blocks, 32, 2, LARGE).values())


@pytest.mark.parametrize("gib", [80, 139, 178])
def test_the_largest_group_fits_and_one_more_would_not(gib: float):
    most = largest_group(FAMILY, QWEN_IMAGE, BLOCKS, SETTINGS, room(gib))
    largest = sorted(BLOCKS, key=lambda block: -float(block.ffn))  # type: ignore[arg-type]
    assert needed(largest[:most]) <= USED * gib * 2**30 < needed(largest[: most + 1])


def test_a_group_is_never_larger_than_asked_for_nor_than_there_are():
    few = SETTINGS.model_copy(update={"group": 3})
    assert largest_group(FAMILY, QWEN_IMAGE, BLOCKS, few, room(10_000)) == 3
    assert largest_group(FAMILY, QWEN_IMAGE, BLOCKS[:2], SETTINGS, room(10_000)) == 2


def test_no_room_for_one_is_said_before_any_training():
    whole = SETTINGS.model_copy(update={"micro_batch": None})
    with pytest.raises(
        LibraryError, match=r"one replacement takes \d+\.\d GiB .* lower library.micro_batch"
    ):
        largest_group(FAMILY, QWEN_IMAGE, BLOCKS, whole, room(80))


def test_room_is_a_share_of_the_gpu_and_pictures_are_those_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    put_latents(open_store(str(tmp_path)))
    longest = max(int(shard.mask.sum(1).max()) for shard in small_latents().shards)
    assert _look(str(tmp_path), None, ENCODING, 0.5) == Room(40 * 2**30, Pictures(16, longest))
