"""Replacements whose training was cut off: what goes on, from where, and that nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from storage import layout
from storage.checkpoint import newest_step
from storage.store import Store, open_store
from tests.trainers.small import load_transformer, small_latents
from trainers.library.checkpoints import Checkpoints
from trainers.library.config import TrainingConfig
from trainers.library.train import Trained, train_replacements
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan

FAMILY = FAMILIES["qwen_image"]
CONFIG = TrainingConfig(fit_batches=2, steps=9, batch_size=4, warmup=2)
EVERY = 2
BLOCKS = [
    BlockPlan(span=(0, 1), start="library"),
    BlockPlan(span=(1, 2), start="library", text="projected"),
    BlockPlan(span=(1, 3), start="library", ffn=0.5),
    BlockPlan(span=(4, 5), start="library"),
]
PREFIXES = {block: layout.replacement("t", str(i)) for i, block in enumerate(BLOCKS)}


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


@pytest.fixture(scope="module")
def whole(teacher: nn.Module) -> dict[BlockPlan, Trained]:
    """What becomes of them when nothing happens."""
    return train_replacements(teacher, FAMILY, BLOCKS, small_latents(), CONFIG, seed=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


class CutOffError(Exception):
    pass


class Until:
    """Sees which steps are reported, and ends the training after so many."""

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.seen: list[int] = []

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.seen.append(done)
        if done == self.last:
            raise CutOffError


def train(
    teacher: nn.Module, store: Store, blocks: Sequence[BlockPlan], until: Until
) -> dict[BlockPlan, Trained]:
    checkpoints = Checkpoints(store, PREFIXES, "tiny", EVERY)
    try:
        return train_replacements(
            teacher, FAMILY, blocks, small_latents(), CONFIG, 5, until, checkpoints
        )
    finally:
        checkpoints.settle()


def cut_off(teacher: nn.Module, store: Store, blocks: Sequence[BlockPlan], at: int) -> None:
    with pytest.raises(CutOffError):
        train(teacher, store, blocks, Until(at))


def saved(store: Store, block: BlockPlan) -> int | None:
    return newest_step(store, layout.library_checkpoints(PREFIXES[block], "tiny"))


def damage(store: Store, block: BlockPlan, newest: int) -> None:
    """Spoils so many of its checkpoints at the end of their tensors."""
    keys = store.keys(layout.library_checkpoints(PREFIXES[block], "tiny"))
    for key in sorted(key for key in keys if key.endswith(".safetensors"))[-newest:]:
        content = bytearray(store.read(key).read())
        content[-5] ^= 1
        store.write(key, bytes(content))


def same(a: Trained, b: Trained) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return a.losses == b.losses and all(torch.equal(left[k], right[k]) for k in left)


def test_it_goes_on_to_the_very_same_weights_without_repeating_what_was_saved(
    teacher: nn.Module, store: Store, whole: dict[BlockPlan, Trained]
):
    cut_off(teacher, store, BLOCKS, 5)
    until = Until()
    trained = train(teacher, store, BLOCKS, until)
    assert until.seen == [4, 5, 6, 7, 8, 9]
    for block in BLOCKS:
        assert same(trained[block], whole[block]), block
        assert trained[block].continued == (4,)
        assert trained[block].ridged == whole[block].ridged
        assert saved(store, block) == 8


def test_replacements_that_meet_from_several_workers_go_on_together(
    teacher: nn.Module, store: Store, whole: dict[BlockPlan, Trained]
):
    cut_off(teacher, store, [BLOCKS[0], BLOCKS[3]], 7)
    cut_off(teacher, store, [BLOCKS[2]], 3)
    cut_off(teacher, store, [BLOCKS[0]], 9)
    until = Until()
    trained = train(teacher, store, BLOCKS[::-1], until)
    assert [trained[block].continued for block in BLOCKS] == [(6, 8), (), (2,), (6,)]
    assert until.seen == list(range(10))
    assert all(same(trained[block], whole[block]) for block in BLOCKS)


def test_a_damaged_checkpoint_is_passed_over(
    teacher: nn.Module, store: Store, whole: dict[BlockPlan, Trained]
):
    cut_off(teacher, store, BLOCKS, 6)
    damage(store, BLOCKS[0], newest=1)
    damage(store, BLOCKS[3], newest=2)
    trained = train(teacher, store, BLOCKS, Until())
    assert [trained[block].continued for block in BLOCKS] == [(4,), (6,), (6,), ()]
    assert all(same(trained[block], whole[block]) for block in BLOCKS)


def test_the_steps_between_checkpoints_change_nothing(
    teacher: nn.Module, store: Store, whole: dict[BlockPlan, Trained]
):
    trained = train(teacher, store, BLOCKS, Until())
    assert all(same(trained[block], whole[block]) for block in BLOCKS)
    assert [trained[block].continued for block in BLOCKS] == [()] * 4
