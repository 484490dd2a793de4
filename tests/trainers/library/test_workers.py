"""The library over Ray workers: trained once, stored piece by piece, reused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from storage.manifest import publish, published
from storage.store import open_store
from tests.trainers.library.setting import BLOCKS, ENCODING, PROBE, SWEEP, put_latents
from tests.trainers.small import load_transformer, small_latents
from trainers.data.latents import open_latents
from trainers.estimate import Pictures
from trainers.evaluate import fidelity_loss
from trainers.library import workers as making
from trainers.library.config import LibraryConfig
from trainers.library.groups import grouped, work
from trainers.library.library import (
    Library,
    LibraryError,
    ReplacementMeta,
    replacement_prefix,
)
from trainers.library.room import Room
from trainers.library.train import train_replacements
from trainers.library.worker import LibraryWorker
from trainers.library.workers import train_library
from trainers.placement import Share
from trainers.probe import make_probe
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
        teacher, BLOCKS[:2], store, ENCODING, CONFIG, SWEEP, probe=PROBE, workers=2, progress=watch
    )
    assert (first.trained, first.reused, first.failed) == (2, 0, {})
    assert watch.seen[-1] == (2 * CONFIG.steps, 2 * CONFIG.steps)
    assert [done for done, _ in watch.seen] == sorted(done for done, _ in watch.seen)

    second = train_library(teacher, BLOCKS, store, ENCODING, CONFIG, SWEEP, probe=PROBE)
    assert (second.trained, second.reused) == (1, 2)
    assert second.prefixes.items() >= first.prefixes.items()
    assert BLOCKS[3] not in second.prefixes

    library = Library(store, second.prefixes, tmp_path / "cache")
    assert set(library.blocks) == set(BLOCKS[:3])
    model = load_transformer(teacher.folder)
    family = FAMILIES["qwen_image"]
    expected = train_replacements(model, family, library.blocks, small_latents(), CONFIG, seed=0)
    for block in library.blocks:
        assert library.damage(block) > 0
        assert library.meta(block).parameters == family.block_parameters(model.config, block)
        for name, tensor in expected[block].module.state_dict().items():
            torch.testing.assert_close(library(block)[name], tensor)
    assert library.damage(BLOCKS[3]) == 0

    plan = Plan(family="qwen_image", teacher_blocks=6, blocks=tuple(BLOCKS[:3]))
    assemble(model, plan, library)
    with pytest.raises(LibraryError, match=r"span \[1, 2\]: not in the library"):
        library(BlockPlan(span=(1, 2), start="library"))


CUT = [BlockPlan(span=(1, 3), start="average"), BlockPlan(span=(4, 4), ffn=0.5)]


class Telling(LibraryWorker):
    """Keeps what it could be heard to say of its steps."""

    told: Sequence[tuple[int, int] | None] = ()

    def update(self, done: int, total: int, **facts: float | str) -> None:
        super().update(done, total, **facts)
        self.told = [*self.told, self.steps()]


def test_what_is_cut_from_the_teacher_is_measured_like_what_is_trained(teacher: Teacher, url: str):
    worker = Telling(teacher, url, None, ENCODING, CONFIG, PROBE, 0, SWEEP, Share(1, 0, 1, "cpu"))
    trained = BLOCKS[0]
    group = [(block, f"library/t/{i}") for i, block in enumerate([*CUT, trained])]
    worker.train(group)

    store, family, model = open_store(url), teacher.family, load_transformer(teacher.folder)
    library = Library(store, dict(group))
    probe = make_probe(model, family, open_latents(store, ENCODING), PROBE, 0)
    for block, prefix in group:
        first, last = block.span
        own = [BlockPlan(span=(i, i)) for i in range(6) if not first <= i <= last]
        blocks = tuple(sorted([*own, block], key=lambda b: b.span))
        plan = Plan(family="qwen_image", teacher_blocks=6, blocks=blocks)
        student = assemble(model, plan, library)
        assert library.damage(block) == pytest.approx(fidelity_loss(student, family, probe))
        assert library.meta(block).parameters == family.block_parameters(model.config, block)
        manifest = published(store, prefix)
        assert manifest is not None
        assert bool(manifest.files) == (block == trained)
    assert worker.told == [(0, done) for done in range(CONFIG.steps + 1)]
    assert worker.steps() is None  # the next group may take none
    metas = [library.meta(block) for block in CUT]
    assert [(meta.loss, meta.training) for meta in metas] == [(None, None)] * 2


@pytest.mark.usefixtures("ray")
def test_what_is_cut_is_measured_once_however_others_are_trained(teacher: Teacher, url: str):
    store, watch = open_store(url), Watch()
    first = train_library(
        teacher, [*CUT, BLOCKS[0]], store, ENCODING, CONFIG, SWEEP, probe=PROBE, progress=watch
    )
    assert (first.trained, first.measured, first.reused) == (1, 2, 0)
    assert watch.seen[-1] == (CONFIG.steps, CONFIG.steps)
    assert set(first.prefixes) == {*CUT, BLOCKS[0]}
    longer = CONFIG.model_copy(update={"steps": 4, "lr": 1e-3})
    again = train_library(teacher, CUT, store, ENCODING, longer, SWEEP, probe=PROBE)
    assert (again.trained, again.measured, again.reused) == (0, 0, 2)
    assert again.prefixes == {block: first.prefixes[block] for block in CUT}


def test_what_is_only_measured_is_bounded_by_the_room_too(
    teacher: Teacher, url: str, monkeypatch: pytest.MonkeyPatch
):
    groups: list[list[BlockPlan]] = []
    monkeypatch.setattr(making, "share_of", lambda *_: Share(1, 1, 1, "cuda"))
    monkeypatch.setattr(making, "find_room", lambda *_: Room(1, Pictures(16, 4)))
    monkeypatch.setattr(making.Crew, "run", lambda _, given, report: groups.extend(given))
    train_library(teacher, CUT, open_store(url), ENCODING, CONFIG, SWEEP, accelerator="gpu")
    assert groups == [[block] for block in CUT]


def test_a_failed_replacement_is_told_and_not_tried_again(teacher: Teacher, url: str):
    store = open_store(url)
    block = BLOCKS[0]
    prefix = replacement_prefix(teacher.digest, block, CONFIG.training, ENCODING, 0)
    meta = ReplacementMeta(block=block, failed="its loss was not finite at step 1")
    publish(store, prefix, {}, meta.model_dump(mode="json"))
    report = train_library(teacher, BLOCKS[:1], store, ENCODING, CONFIG, SWEEP, probe=PROBE)
    assert report.failed == {block: "its loss was not finite at step 1"}
    assert (report.prefixes, report.trained, report.reused) == ({}, 0, 1)


def test_names_tell_apart_what_was_trained_differently():
    block = BlockPlan(span=(0, 1), start="library")

    def name(block=block, training=CONFIG.training, encoding=ENCODING, seed=0) -> str:
        return replacement_prefix("teacher", block, training, encoding, seed)

    others = {
        name(BlockPlan(span=(0, 2), start="library")),
        name(BlockPlan(span=(0, 1), start="library", ffn=0.5)),
        name(BlockPlan(span=(0, 1), start="first")),
        name(BlockPlan(span=(0, 1), start="average")),
        name(training=LibraryConfig(steps=4).training),
        name(encoding="encoded/other"),
        name(seed=1),
    }
    assert len(others) == 7
    assert name() not in others

    cut, longer = BlockPlan(span=(0, 1), start="average"), LibraryConfig(steps=4).training
    assert name(cut) == name(cut, training=longer)
    assert len({name(cut), name(cut, encoding="encoded/other"), name(cut, seed=1)}) == 3


def test_groups_keep_every_worker_busy_and_none_too_full():
    spans = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    blocks = [BlockPlan(span=span, start="library") for span in spans]
    for workers, largest in ((1, 100), (2, 100), (2, 4), (4, 3), (40, 5)):
        groups = grouped(blocks, workers, largest)
        assert {b for group in groups for b in group} == set(blocks)
        assert sum(map(len, groups)) == len(blocks)
        assert max(map(len, groups)) <= largest
        assert len(groups) >= min(workers, len(blocks))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_groups_that_only_measure_come_last_and_take_no_steps():
    groups = grouped([*CUT, *BLOCKS[:3]], 2, 10)
    assert [{block.untrained for block in group} for group in groups] == [
        {False}, {False}, {True}, {True},
    ]  # fmt: skip
    assert [work(group) > 0 for group in groups] == [True, True, False, False]
    assert grouped(CUT, 1, 10) == [CUT]
