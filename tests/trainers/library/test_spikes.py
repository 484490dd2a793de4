"""Replacements whose loss spikes: where they go back to, at which rate, how often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from storage import layout
from storage.checkpoint import newest_step
from storage.store import Store, open_store
from tests.trainers.small import load_transformer, small_latents
from trainers.library import train as training
from trainers.library.checkpoints import Checkpoints
from trainers.library.config import TrainingConfig
from trainers.library.train import SETBACKS, SPIKE, Trained, train_replacements
from trainers.optimizer import rate_at
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan

FAMILY = FAMILIES["qwen_image"]
CONFIG = TrainingConfig(fit_batches=1, steps=28, batch_size=2, warmup=2)
EVERY = 8
CALM, RESTLESS = BLOCKS = [
    BlockPlan(span=(0, 1), start="library"),
    BlockPlan(span=(1, 3), start="library", ffn=0.5),
]
PREFIXES = {block: layout.replacement("t", str(i)) for i, block in enumerate(BLOCKS)}


class Steps:
    """Which steps are reported."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def update(self, done: int, total: int, **facts: float | str) -> None:
        self.seen.append(done)


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.fixture(scope="module")
def whole(teacher: nn.Module) -> dict[BlockPlan, Trained]:
    """What becomes of them when nothing happens."""
    return train(teacher)


def train(
    teacher: nn.Module,
    store: Store | None = None,
    config: TrainingConfig = CONFIG,
    steps: Steps | None = None,
) -> dict[BlockPlan, Trained]:
    kept = Checkpoints(store, PREFIXES, "tiny", EVERY) if store else None
    return train_replacements(teacher, FAMILY, BLOCKS, small_latents(), config, 5, steps, kept)


def same(a: Trained, b: Trained) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return a.losses == b.losses and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def spiking(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], list[float]]:
    """Makes losses of the restless one spike, by how many it has had; its rates as they come."""
    backward, adamw = training._backward, training.adamw
    rates: list[float] = []

    def watched(groups, lr):
        made = adamw(groups, lr)
        made.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[1]["lr"]))
        return made

    def begin(when: set[int]) -> list[float]:
        calls = 0

        def shaken(family, module, block, *arguments, **named):
            nonlocal calls
            loss = backward(family, module, block, *arguments, **named)
            if block == RESTLESS:
                calls += 1
                if calls - 1 in when:
                    return loss * 2 * SPIKE
            return loss

        monkeypatch.setattr(training, "_backward", shaken)
        return rates

    monkeypatch.setattr(training, "adamw", watched)
    return begin


def test_from_a_spike_it_goes_back_to_its_checkpoint_and_on_at_half_the_rate(
    teacher: nn.Module, store: Store, whole: dict[BlockPlan, Trained], spiking, caplog
):
    rates, steps = spiking({22}), Steps()
    made = train(teacher, store, steps=steps)
    assert same(made[CALM], whole[CALM])
    assert made[CALM].setbacks == 0
    restless = made[RESTLESS]
    assert (restless.failed, restless.setbacks, restless.continued) == (None, 1, ())
    assert len(restless.losses) == CONFIG.steps
    # The loss of step 16 is of what the checkpoint holds; from then on it learns otherwise.
    assert restless.losses[:17] == whole[RESTLESS].losses[:17]
    assert restless.losses[18:] != whole[RESTLESS].losses[18:]
    assert steps.seen == [*range(29), *range(16, 29)]
    assert rates[28:] == [CONFIG.lr * rate_at(step, 28, 2) / 2 for step in range(16, 28)]
    assert "step 22: the loss rose to" in caplog.text
    assert "going back to step 16" in caplog.text


def test_without_a_checkpoint_it_starts_over(teacher: nn.Module, spiking):
    spiking({20})
    made = train(teacher)[RESTLESS]
    spiking(set())
    half = CONFIG.model_copy(update={"lr": CONFIG.lr / 2})
    assert same(made, train(teacher, config=half)[RESTLESS])


def test_gone_back_to_twice_a_checkpoint_is_not_trusted(teacher: nn.Module, store: Store, spiking):
    # At step 22, again at 22 when it comes there from 16, and then not any more.
    spiking({22, 22 + 7})
    steps = Steps()
    made = train(teacher, store, steps=steps)[RESTLESS]
    assert made.setbacks == 2
    # The second time it was alone, and its pass ended there.
    assert steps.seen == [*range(29), *range(16, 23), *range(8, 29)]
    # What the other has is its own affair.
    assert newest_step(store, layout.library_checkpoints(PREFIXES[CALM], "tiny")) == 24


def test_spikes_pass_when_going_back_did_not_help(teacher: nn.Module, store: Store, spiking):
    # At step 22 whenever it comes there: from the start, from 16, from 8, and from 16 anew.
    spiking({22, 29, 44, 51})
    steps = Steps()
    made = train(teacher, store, steps=steps)[RESTLESS]
    assert (made.failed, made.setbacks) == (None, SETBACKS)
    assert steps.seen == [*range(29), *range(16, 23), *range(8, 23), *range(16, 29)]
    assert made.losses[22] > SPIKE * made.losses[21]


def test_another_worker_goes_on_at_the_rate_that_it_had_come_to(
    teacher: nn.Module, store: Store, spiking
):
    rates = spiking({22})
    made = train(teacher, store)[RESTLESS]
    (last, begun) = (rates[-1], len(rates))
    spiking(set())
    again = train(teacher, store)[RESTLESS]  # from the checkpoint of step 24
    assert again.continued == (24,)
    assert again.setbacks == 1
    assert (again.losses, rates[-1], len(rates) - begun) == (made.losses, last, CONFIG.steps - 24)
