"""A sharded model computes what the whole one does, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed

from tests.trainers.students.tiny import FAMILY_TEACHERS, Tiny
from trainers import sharded
from trainers.distilled import Distilled, Observed
from trainers.optimizer import adamw
from trainers.recovery import Example, backward, set_trainable
from trainers.schedule import Phase
from trainers.sharded import shard
from trainers.students.families.base import Inputs, State
from trainers.students.surgery import assemble


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of this process alone: what is gathered and cast does not depend on its size."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def in_half(tiny: Tiny) -> Inputs:
    """Its inputs in bfloat16."""
    half, inputs = torch.bfloat16, tiny.inputs(padded=False)
    return replace(
        inputs,
        noisy_BNC=inputs.noisy_BNC.to(half),
        timestep_B=inputs.timestep_B.to(half),
        embeds_BMD=inputs.embeds_BMD.to(half),
        pooled_BP=None if inputs.pooled_BP is None else inputs.pooled_BP.to(half),
    )


@pytest.mark.parametrize("tiny", FAMILY_TEACHERS, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("smallest", [0, 2**22], ids=["block by block", "together"])
def test_sharding_changes_nothing_in_low_precision(
    tiny: Tiny, smallest: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sharded, "SMALLEST_UNIT", smallest)
    half, inputs = torch.bfloat16, in_half(tiny)
    model = tiny.model().to(half)
    student = assemble(model, tiny.cut)
    expected = [tiny.family.forward(each, inputs) for each in (model, student)]
    observed = Observed(tiny.family, model)
    distilled = Distilled(tiny.family, student.float(), tiny.cut)
    for module in (observed, distilled):
        shard(module, torch.device("cpu"), half)
    assert torch.equal(observed(inputs), expected[0])
    assert torch.equal(distilled(inputs), expected[1])
    states: list[State] = []
    observed(inputs, lambda edge, state: states.append(state))
    assert len(states) == 7
    for place, first in ((0, 0), (1, 3)):
        assert distilled(inputs, place, states[first]).image_BND.dtype == half


def test_weights_gradients_and_moments_are_float32_under_half_precision():
    half, tiny = torch.bfloat16, FAMILY_TEACHERS[0]
    student = Distilled(tiny.family, assemble(tiny.model(), tiny.cut), tiny.cut)
    shard(student, torch.device("cpu"), half)
    student.requires_grad_(True)
    seen: list[torch.dtype] = []
    student.blocks[0].attn.to_q.register_forward_pre_hook(
        lambda module, arguments: seen.extend([module.weight.dtype, arguments[0].dtype])
    )
    inputs = in_half(tiny)
    student(inputs).float().square().mean().backward()
    assert seen == [half, half]
    optimizer = adamw(student.parameters(), 1e-3)
    optimizer.step()
    weight = student.blocks[0].attn.to_q.weight
    held = optimizer.state[weight]
    kinds = {weight.dtype, weight.grad.dtype, held["exp_avg"].dtype, held["exp_avg_sq"].dtype}
    assert kinds == {torch.float32}


@pytest.mark.parametrize("smallest", [0, 2**22], ids=["block by block", "together"])
def test_replacements_learn_one_after_another_in_low_precision(
    smallest: int, monkeypatch: pytest.MonkeyPatch
):
    """A gradient that is put off until the last one's is in float32, and the last as computed."""
    monkeypatch.setattr(sharded, "SMALLEST_UNIT", smallest)
    half, tiny = torch.bfloat16, FAMILY_TEACHERS[0]
    inputs = in_half(tiny)
    observed = Observed(tiny.family, tiny.model().to(half))
    student = Distilled(tiny.family, assemble(tiny.model(), tiny.cut), tiny.cut)
    for module in (observed, student):
        shard(module, torch.device("cpu"), half)
    phase = Phase(loss="span", steps=1, lr=1e-3)
    set_trainable(student, phase)
    example = Example(inputs, inputs.noisy_BNC, inputs.noisy_BNC)
    loss = backward(student, observed, example, phase, lambda value: value)
    assert loss.isfinite()
    assert len(student.replaced) > 1
    for replaced in student.replaced:
        gradients = [p.grad for p in student.blocks[replaced.place].parameters()]
        assert any(g is not None and g.to_local().abs().max() > 0 for g in gradients)
        assert {g.dtype for g in gradients if g is not None} == {torch.float32}
