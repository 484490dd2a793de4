"""The library over Ray workers: trained once, stored piece by piece, reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storage.manifest import publish
from storage.store import open_store
from tests.trainers.library.setting import BLOCKS, ENCODING, PROBE, put_latents
from tests.trainers.small import load_transformer, small_latents
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped
from trainers.library.library import (
    Library,
    LibraryError,
    ReplacementMeta,
    library_block,
    replacement_prefix,
)
from trainers.library.train import train_replacements
from trainers.library.workers import train_library
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble
from trainers.teacher import Teacher

CONFIG = LibraryConfig(steps=3, batch_size=4, warmup=1, group=2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store that holds the small latents."""
    store = open_store(str(tmp_path / "store"))
    put_latents(store)
    return store.url


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.seen.append((done, total))


@pytest.mark.usefixtures("ray")
def test_replacements_are_trained_once_stored_and_assembled(
    teacher: Teacher, url: str, tmp_path: Path
):
    store, watch = open_store(url), Watch()
    first = train_library(
        teacher, BLOCKS[:2], store, ENCODING, CONFIG, probe=PROBE, workers=2, progress=watch
    )
    assert (first.trained, first.reused, first.failed) == (2, 0, {})
    assert watch.seen[-1] == (2 * CONFIG.steps, 2 * CONFIG.steps)
    assert [done for done, _ in watch.seen] == sorted(done for done, _ in watch.seen)

    second = train_library(teacher, BLOCKS, store, ENCODING, CONFIG, probe=PROBE)
    assert (second.trained, second.reused) == (1, 2)
    assert second.prefixes.items() >= first.prefixes.items()
    assert BLOCKS[3] not in second.prefixes

    library = Library(store, second.prefixes, tmp_path / "cache")
    assert set(library.blocks) == {library_block(block) for block in BLOCKS[:3]}
    model = load_transformer(teacher.folder)
    family = FAMILIES["qwen_image"]
    expected = train_replacements(model, family, library.blocks, small_latents(), CONFIG, seed=0)
    for block in library.blocks:
        assert library.damage(block) > 0
        assert library.meta(block).parameters == family.block_parameters(model.config, block)
        for name, tensor in expected[block].module.state_dict().items():
            torch.testing.assert_close(library(block)[name], tensor)
    assert library.damage(BLOCKS[3]) == 0

    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=tuple(library_block(block) for block in BLOCKS[:3]),
    )
    assemble(model, plan, library)
    with pytest.raises(LibraryError, match=r"span \[1, 2\]: not in the library"):
        library(BlockPlan(span=(1, 2)))


def test_a_failed_replacement_is_told_and_not_tried_again(teacher: Teacher, url: str):
    store = open_store(url)
    block = library_block(BLOCKS[0])
    prefix = replacement_prefix(teacher.digest, block, CONFIG.training, ENCODING, 0)
    meta = ReplacementMeta(block=block, failed="its loss was not finite at step 1")
    publish(store, prefix, {}, meta.model_dump(mode="json"))
    report = train_library(teacher, BLOCKS[:1], store, ENCODING, CONFIG, probe=PROBE)
    assert report.failed == {block: "its loss was not finite at step 1"}
    assert (report.prefixes, report.trained, report.reused) == ({}, 0, 1)


def test_names_tell_apart_what_was_trained_differently():
    block = BlockPlan(span=(0, 1))

    def name(block=block, training=CONFIG.training, encoding=ENCODING, seed=0) -> str:
        return replacement_prefix("teacher", block, training, encoding, seed)

    assert name() == name(BlockPlan(span=(0, 1), start="library"))
    others = {
        name(BlockPlan(span=(0, 2))),
        name(BlockPlan(span=(0, 1), ffn=0.5)),
        name(training=LibraryConfig(steps=4).training),
        name(encoding="encoded/other"),
        name(seed=1),
    }
    assert len(others) == 5
    assert name() not in others


def test_groups_keep_every_worker_busy_and_none_too_full():
    blocks = [BlockPlan(span=(a, b)) for a in range(6) for b in range(a + 1, 6)]
    for workers, largest in ((1, 100), (2, 100), (2, 4), (4, 3), (40, 5)):
        groups = grouped(blocks, workers, largest)
        assert {b for group in groups for b in group} == set(blocks)
        assert sum(map(len, groups)) == len(blocks)
        assert max(map(len, groups)) <= largest
        assert len(groups) >= min(workers, len(blocks))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
