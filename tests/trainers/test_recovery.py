"""Recovery: what each phase trains, that a run continues to the last bit, golden losses, NaN."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from trainers.data.latents import Latents, Shard
from trainers.distilled import Distilled, Observed, detached
from trainers.losses import span_loss
from trainers.recovery import (
    NanLossError,
    Position,
    RecoveryError,
    examples_of,
    held_tensors,
    phase_loss,
    recover,
    restore_weights,
    set_trainable,
    student_weights,
)
from trainers.schedule import Phase, Schedule
from trainers.students.families import family_named
from trainers.students.plan import BlockPlan, Plan, identity_plan
from trainers.students.surgery import assemble

FAMILY = family_named("qwen_image")
PLAN = Plan(
    family="qwen_image",
    teacher_blocks=4,
    blocks=(BlockPlan(span=(0, 0)), BlockPlan(span=(1, 2)), BlockPlan(span=(3, 3), ffn=0.5)),
)
SCHEDULE = Schedule(
    phases=(
        Phase(loss="span", steps=5, lr=2e-3, batch_size=4, warmup=1),
        Phase(loss="velocity", train="all", steps=5, lr=1e-3, batch_size=4, warmup=1),
        Phase(loss="diffusion", train="all", steps=3, lr=1e-4, batch_size=2, warmup=0),
    )
)
START = Position()
# fmt: off
GOLDEN = (
    0.0184777, 0.019737, 0.0172939, 0.0147382, 0.018276,  # span
    0.00256596, 0.00270887, 0.00228251, 0.00220265, 0.00277638,  # velocity
    2.01292, 2.51439, 2.18519,  # diffusion
)
# fmt: on
"""Losses of every step, recorded with torch 2.13 on a CPU."""


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
    )


@pytest.fixture(scope="module")
def latents() -> Latents:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 5, (12,), generator=generator)
    shard = Shard(
        latents=torch.randn(12, 16, 4, 4, generator=generator),
        embeds=torch.randn(12, 4, 12, generator=generator),
        mask=torch.arange(4) < lengths[:, None],
        captions=tuple(map(str, range(12))),
    )
    return Latents([shard], held_out=2)


@dataclass
class Run:
    """A recovery that keeps what a checkpoint at `keep` would."""

    teacher: nn.Module
    latents: Latents
    keep: Position | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.student = Distilled(FAMILY, assemble(self.teacher, PLAN), PLAN)

    def go(self, at: Position = START, tensors: dict[str, Tensor] | None = None) -> Run:
        if tensors is not None:
            restore_weights(self.student, tensors)
        recover(
            self.student,
            Observed(FAMILY, self.teacher),
            examples_of(self.latents, seed=3),
            SCHEDULE,
            at,
            optimizer_tensors=tensors,
            save=self._save,
            report=lambda _, loss: self.losses.append(loss),
        )
        return self

    def _save(self, at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        if at == self.keep:
            held = held_tensors(student, optimizer if at.step else None)
            self.kept = {name: tensor.clone() for name, tensor in held.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return student_weights(held_tensors(self.student, None))


def test_a_position_walks_through_all_phases() -> None:
    at, seen = Position(), []
    while at.phase < len(SCHEDULE.phases):
        seen.append(at.done(SCHEDULE))
        at = at.after(SCHEDULE)
    assert seen == list(range(SCHEDULE.steps))
    assert at == Position(3, 0)


@pytest.mark.parametrize("cut", [Position(0, 3), Position(1, 0), Position(1, 4), Position(2, 1)])
def test_an_interrupted_run_continues_to_the_last_bit(
    teacher: nn.Module, latents: Latents, cut: Position
) -> None:
    whole = Run(teacher, latents, keep=cut).go()
    rest = Run(teacher, latents).go(cut, whole.kept)
    assert rest.losses == whole.losses[cut.done(SCHEDULE) :]
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, rest.weights[name]), name


def test_golden_losses(teacher: nn.Module, latents: Latents) -> None:
    assert Run(teacher, latents).go().losses == pytest.approx(GOLDEN, rel=1e-3)


def test_span_phase_trains_replacements_alone(teacher: nn.Module, latents: Latents) -> None:
    run = Run(teacher, latents)
    before = {name: tensor.clone() for name, tensor in run.weights.items()}
    recover(
        run.student,
        Observed(FAMILY, teacher),
        examples_of(latents, seed=3),
        Schedule(phases=SCHEDULE.phases[:1]),
    )
    changed = {
        name for name, tensor in run.weights.items() if not torch.equal(tensor, before[name])
    }
    assert {name.split(".")[1] for name in changed} == {"1", "2"}
    assert all(name.startswith("transformer_blocks.") for name in changed)


def test_replacements_may_be_fed_the_students_own_states(
    teacher: nn.Module, latents: Latents
) -> None:
    """Against the loss written out, and with no gradient from one replacement to another."""
    student = Run(teacher, latents).student
    phase = SCHEDULE.phases[0].model_copy(update={"inputs": "student"})
    set_trainable(student, phase)
    example = next(examples_of(latents, seed=3)(0, phase, 0))
    phase_loss(student, Observed(FAMILY, teacher), example, phase).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    other = Run(teacher, latents).student
    set_trainable(other, phase)
    ends = {i: block.span[1] for i, block in enumerate(PLAN.blocks) if not block.untouched}
    state, context = FAMILY.begin(teacher, example.inputs)
    states = []
    for block in FAMILY.block_modules(teacher):
        state = FAMILY.run_block(block, state, context)
        states.append(state)
    state, context = FAMILY.begin(other.student, example.inputs)
    for i, block in enumerate(other.blocks):
        state = FAMILY.run_block(block, detached(state), context)
        if i in ends:
            text = ends[i] + 1 < len(states)
            loss = span_loss(
                state, detached(states[ends[i]]), example.inputs.mask_BM, phase.magnitude, text=text
            )
            (loss / len(ends)).backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert {name.split(".")[2] for name in found} == {str(i) for i in ends}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_every_phase_lowers_its_loss(teacher: nn.Module, latents: Latents) -> None:
    long = Schedule(phases=(SCHEDULE.phases[1].model_copy(update={"steps": 40}),))
    losses: list[float] = []
    run = Run(teacher, latents)
    recover(
        run.student,
        Observed(FAMILY, teacher),
        examples_of(latents, seed=3),
        long,
        report=lambda _, loss: losses.append(loss),
    )
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_teacher_stays_as_it_is(teacher: nn.Module, latents: Latents) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    Run(teacher, latents).go()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_nan_ends_the_run_and_says_where(teacher: nn.Module, latents: Latents) -> None:
    run = Run(teacher, latents)
    with torch.no_grad():
        run.student.blocks[1].img_mlp.net[2].weight[0, 0] = float("nan")
    with pytest.raises(NanLossError, match=r"phase 0 \(span\), step 0"):
        run.go()
    assert run.losses == []


def test_ranks_share_a_batch(teacher: nn.Module, latents: Latents) -> None:
    phase = SCHEDULE.phases[0]
    whole = next(examples_of(latents, 5)(0, phase, 7))
    halves = [next(examples_of(latents, 5, rank, 2)(0, phase, 7)) for rank in (0, 1)]
    together = torch.cat([half.inputs.noisy_BNC for half in halves])
    assert torch.equal(together, whole.inputs.noisy_BNC)


def test_phases_see_different_data(latents: Latents) -> None:
    phase = SCHEDULE.phases[0]
    first, second = (next(examples_of(latents, 5)(number, phase, 0)) for number in (0, 1))
    assert not torch.equal(first.noise_BNC, second.noise_BNC)


def test_a_plan_without_replacements_has_none_to_train(
    teacher: nn.Module, latents: Latents
) -> None:
    plan = identity_plan("qwen_image", 4)
    student = Distilled(FAMILY, assemble(teacher, plan), plan)
    with pytest.raises(RecoveryError, match="replaces no block"):
        recover(student, Observed(FAMILY, teacher), examples_of(latents, 0), SCHEDULE)
