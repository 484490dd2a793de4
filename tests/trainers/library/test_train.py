from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.trainers.small import load_transformer, small_latents
from trainers.library import train as training
from trainers.library.config import LibraryConfig, TrainingConfig
from trainers.library.train import Trained, train_replacements
from trainers.students.families import FAMILIES
from trainers.students.plan import BlockPlan

FAMILY = FAMILIES["qwen_image"]
STEPS = 4
CONFIG = TrainingConfig(fit_batches=2, steps=STEPS, batch_size=4, warmup=1)
BLOCKS = [
    BlockPlan(span=(0, 1), start="library"),
    BlockPlan(span=(1, 3), start="library", ffn=0.5),
    BlockPlan(span=(4, 4), start="library", ffn=0.25),
    BlockPlan(span=(4, 5), start="library"),
    BlockPlan(span=(1, 2), start="library", text="projected"),
    BlockPlan(span=(3, 3), start="library", ffn="linear"),
]


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path) -> nn.Module:
    return load_transformer(tiny_pipeline)


def train(teacher: nn.Module, blocks: list[BlockPlan]) -> dict[BlockPlan, Trained]:
    return train_replacements(teacher, FAMILY, blocks, small_latents(), CONFIG, seed=5)


def equal(a: Trained, b: Trained) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_replacement_is_the_same_whatever_is_trained_beside_it(teacher: nn.Module):
    together = train(teacher, BLOCKS)
    apart = {**train(teacher, BLOCKS[2:]), **train(teacher, BLOCKS[1::-1])}
    for block in BLOCKS:
        assert equal(together[block], apart[block]), block
        assert together[block].losses == apart[block].losses
        assert len(together[block].losses) == STEPS
        assert together[block].failed is None


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_in_parts_teaches_what_the_whole_does(teacher: nn.Module, micro_batch: int):
    """Captions of several lengths and linear maps too, whose tokens parts share unevenly."""
    whole = train(teacher, BLOCKS)
    parts = train_replacements(
        teacher, FAMILY, BLOCKS, small_latents(), CONFIG, seed=5, micro_batch=micro_batch
    )
    for block in BLOCKS:
        assert parts[block].losses == pytest.approx(whole[block].losses, rel=1e-4), block
        expected, found = whole[block].module.state_dict(), parts[block].module.state_dict()
        for name, tensor in expected.items():
            # A step of Adam moves a weight by the rate, whatever the size of its gradient: where
            # that is next to nothing, its sign is noise.
            apart = (found[name] - tensor).square().mean().sqrt()
            assert apart < CONFIG.lr / 20, (block, name)


def test_no_more_pictures_pass_together_than_asked(teacher: nn.Module):
    counts = []
    hook = FAMILY.block_modules(teacher)[0].register_forward_hook(
        lambda _, read, named, out: counts.append(len(out[0])), with_kwargs=True
    )
    try:
        train_replacements(
            teacher, FAMILY, BLOCKS[:1], small_latents(), CONFIG, seed=5, micro_batch=3
        )
    finally:
        hook.remove()
    assert counts == [2, 2] * STEPS


def test_a_replacement_says_which_of_its_fits_were_singular(teacher: nn.Module):
    blocks = [BLOCKS[0], BLOCKS[4]]
    few = CONFIG.model_copy(update={"fit_batches": 1, "batch_size": 1, "steps": 1})
    trained = train_replacements(teacher, FAMILY, blocks, small_latents(), few, seed=5)
    assert trained[blocks[0]].ridged == ()
    assert set(trained[blocks[1]].ridged) == set(FAMILY.maps(blocks[1]))
    assert trained[blocks[1]].failed is None
    many = CONFIG.model_copy(update={"fit_batches": 12, "batch_size": 8, "steps": 1})
    trained = train_replacements(teacher, FAMILY, blocks, small_latents(), many, seed=5)
    assert trained[blocks[1]].ridged == ()


def test_the_teacher_runs_once_a_step_and_not_beyond_the_last_span(teacher: nn.Module):
    calls = dict.fromkeys(range(6), 0)

    def count(index: int) -> None:
        calls[index] += 1

    hooks = [
        block.register_forward_hook(lambda *_, index=index: count(index))
        for index, block in enumerate(FAMILY.block_modules(teacher))
    ]
    try:
        train(teacher, BLOCKS)
        # Two more to fit linear maps, the last of which is block 3's.
        assert calls == {i: STEPS + (2 if i <= 3 else 0) for i in range(6)}
        calls |= dict.fromkeys(range(6), 0)
        train(teacher, BLOCKS[:2])
        assert calls == {0: STEPS, 1: STEPS, 2: STEPS, 3: STEPS, 4: 0, 5: 0}
    finally:
        for hook in hooks:
            hook.remove()


def test_training_moves_replacements_towards_the_teacher_and_leaves_it_alone(teacher: nn.Module):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    config = TrainingConfig(steps=60, batch_size=8, warmup=4, start="average")
    trained = train_replacements(teacher, FAMILY, BLOCKS[:2], small_latents(), config, seed=0)
    for made in trained.values():
        assert sum(made.losses[-5:]) < 0.6 * sum(made.losses[:5])
        assert not any(p.requires_grad for p in made.module.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_one_nan_replacement_does_not_stop_the_others(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    whole = train(teacher, BLOCKS[:3])
    make_block = training.make_block

    def poisoned(family, config, blocks, block, fits):
        made = make_block(family, config, blocks, block, fits=fits)
        if block.span == BLOCKS[1].span:
            with torch.no_grad():
                made.img_mlp.net[2].bias[0] = torch.nan
        return made

    monkeypatch.setattr(training, "make_block", poisoned)
    trained = train(teacher, BLOCKS[:3])
    assert trained[BLOCKS[1]].failed == (
        "its loss or gradient was not finite at step 3, after its rate had been halved 3 times; "
        "lower library.lr"
    )
    for block in (BLOCKS[0], BLOCKS[2]):
        assert trained[block].failed is None
        assert equal(trained[block], whole[block])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken_and_the_rate_halves(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, what: str
):
    whole = train(teacher, BLOCKS[:2])
    backward, seen = training._backward, []

    def poisoned(family, module, block, *arguments, **named):
        loss = backward(family, module, block, *arguments, **named)
        if block == BLOCKS[1]:
            weights = [p.detach().clone() for p in module.parameters()]
            seen.append(weights)
            if len(seen) == 2:
                if what == "loss":
                    return loss * torch.nan
                next(module.parameters()).grad.view(-1)[0] = torch.inf
        return loss

    rates = []
    adamw = training.adamw

    def watched(groups, lr):
        made = adamw(groups, lr)
        made.register_step_pre_hook(
            lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
        )
        return made

    monkeypatch.setattr(training, "_backward", poisoned)
    monkeypatch.setattr(training, "adamw", watched)
    trained = train(teacher, BLOCKS[:2])
    made = trained[BLOCKS[1]]
    assert made.failed is None
    assert [math.isnan(loss) for loss in made.losses] == [False, True, False, False]
    assert not all(map(torch.equal, seen[0], seen[1]))
    assert all(map(torch.equal, seen[1], seen[2]))  # the second step left them alone
    assert [b / a for a, b in rates] == [1, 1, 0.5, 0.5]
    assert equal(trained[BLOCKS[0]], whole[BLOCKS[0]])


def test_a_teacher_in_half_precision_gets_replacements_in_its_dtype(tiny_pipeline: Path):
    teacher = load_transformer(tiny_pipeline).bfloat16()
    made = train(teacher, BLOCKS[:1])[BLOCKS[0]]
    assert made.failed is None
    assert {p.dtype for p in made.module.parameters()} == {torch.bfloat16}


def test_what_is_offered_does_not_rename_what_was_trained():
    a, b = LibraryConfig(max_span=2, group=3), LibraryConfig(widths=(1.0,), starts=("average",))
    assert a.training == b.training
    assert LibraryConfig(steps=7).training != a.training


@pytest.mark.parametrize("starts", [[], ["last"]])
def test_starts_are_some_of_those_that_plans_have(starts: list[str]):
    with pytest.raises(ValidationError, match="starts"):
        LibraryConfig.model_validate({"starts": starts})
