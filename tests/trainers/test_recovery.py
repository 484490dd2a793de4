"""Recovery: what each phase trains, that a run continues to the last bit, golden losses, NaN."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from storage.checkpoint import Saver
from storage.store import open_store
from storage.stored import open_tensors
from tests.trainers.recovering import FAMILY, PLAN, make_latents, make_teacher
from trainers.data.latents import Latents
from trainers.distilled import Distilled, Observed, compile_blocks, detached, local
from trainers.losses import span_loss
from trainers.optimizer import make_optimizer, moments, set_moments, set_rate
from trainers.recovery import (
    NanLossError,
    Position,
    RecoveryError,
    Start,
    backward,
    batch_numbers,
    examples_of,
    held_tensors,
    read_held,
    recover,
    restore_weights,
    set_trainable,
    student_weights,
)
from trainers.schedule import PLAIN, Phase, Schedule, StepConfig
from trainers.students.families.base import State
from trainers.students.plan import identity_plan
from trainers.students.surgery import assemble

SCHEDULE = Schedule(
    phases=(
        Phase(loss="span", steps=5, lr=2e-3, batch_size=4, warmup=1),
        Phase(loss="velocity", train="all", steps=5, lr=1e-3, batch_size=4, warmup=1),
        Phase(loss="diffusion", train="all", steps=3, lr=1e-4, batch_size=2, warmup=0),
    )
)
REUSING = Schedule(
    phases=(Phase(loss="velocity", train="all", steps=30, lr=1e-3, batch_size=4, reuse=2),)
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
    return make_teacher()


@pytest.fixture(scope="module")
def latents() -> Latents:
    return make_latents()


def alone(value: Tensor) -> Tensor:
    """The mean over one rank."""
    return value


@dataclass
class Run:
    """A recovery that keeps what a checkpoint at `keep` would."""

    teacher: nn.Module
    latents: Latents
    keep: Position | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    step: StepConfig = PLAIN
    schedule: Schedule = SCHEDULE
    asked: list[int] = field(default_factory=list)
    """Steps at which the teacher was."""

    def __post_init__(self) -> None:
        self.student = Distilled(FAMILY, assemble(self.teacher, PLAN), PLAN, self.step)

    def go(self, at: Position = START, tensors: dict[str, Tensor] | None = None) -> Run:
        if tensors is not None:
            restore_weights(self.student, tensors)
        first = at.done(self.schedule)
        teacher = Observed(FAMILY, self.teacher)
        teacher.register_forward_pre_hook(lambda *_: self.asked.append(first + len(self.losses)))
        recover(
            self.student,
            teacher,
            examples_of(self.latents, seed=3),
            self.schedule,
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


STEPS = {
    "plain": PLAIN,
    "everything": StepConfig(micro_batch=3, checkpointing=True, average=0.9),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("cut", [Position(0, 3), Position(1, 0), Position(1, 4), Position(2, 1)])
def test_an_interrupted_run_continues_to_the_last_bit(
    teacher: nn.Module, latents: Latents, cut: Position, step: StepConfig
) -> None:
    whole = Run(teacher, latents, keep=cut, step=step).go()
    rest = Run(teacher, latents, step=step).go(cut, whole.kept)
    assert rest.losses == whole.losses[cut.done(SCHEDULE) :]
    expected, found = (held_tensors(run.student, None) for run in (whole, rest))
    assert any(name.startswith("average/") for name in expected) == (step.average is not None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


class StoppedError(Exception):
    """Ends a run at a step."""


def test_what_a_run_goes_on_from_is_in_memory_once(teacher: nn.Module, latents: Latents) -> None:
    cut = Position(1, 2)
    whole = Run(teacher, latents, keep=cut).go()
    student = Run(teacher, latents).student
    restore_weights(student, whole.kept)
    start = Start(cut, optimizer_tensors=whole.kept)
    read = [t for name, t in whole.kept.items() if name.startswith("optimizer/")]
    places, alive = {tensor.data_ptr() for tensor in read}, [weakref.ref(tensor) for tensor in read]
    del read

    def save(at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        held = [t for p in student.parameters() for t in moments(optimizer, p).values()]
        assert {tensor.data_ptr() for tensor in held} == places
        del held
        optimizer.state.clear()
        gc.collect()
        assert [tensor() for tensor in alive if tensor() is not None] == []
        raise StoppedError

    with pytest.raises(StoppedError):
        recover(
            student, Observed(FAMILY, teacher), examples_of(latents, seed=3), SCHEDULE, start.at,
            optimizer_tensors=start.optimizer_tensors, save=save,
        )  # fmt: skip


@pytest.mark.parametrize(("reuse", "start"), [(1, 0), (1, 11), (2, 0), (2, 13), (3, 21)])
def test_every_group_of_batches_is_used_so_many_times(reuse: int, start: int) -> None:
    numbers = list(islice(batch_numbers(reuse, 0), 96))
    assert sorted(numbers) == sorted(list(range(96 // reuse)) * reuse)
    for at in range(0, 96, 8):  # eight steps see eight batches, in order
        assert numbers[at : at + 8] == list(range(numbers[at], numbers[at] + 8))
    assert list(islice(batch_numbers(reuse, start), 96 - start)) == numbers[start:]


def test_the_teacher_answers_once_for_each_batch(teacher: nn.Module, latents: Latents) -> None:
    run = Run(teacher, latents, schedule=REUSING).go()
    assert run.asked == [*range(8), *range(16, 24)]
    parts = Run(teacher, latents, schedule=REUSING, step=StepConfig(micro_batch=2)).go()
    assert parts.asked == [step for step in run.asked for _ in range(2)]
    assert parts.losses == pytest.approx(run.losses, rel=1e-4)


@pytest.mark.parametrize("cut", [5, 11, 16])
def test_a_run_that_reuses_answers_continues_to_the_last_bit(
    teacher: nn.Module, latents: Latents, cut: int
) -> None:
    at = Position(0, cut)
    whole = Run(teacher, latents, keep=at, schedule=REUSING).go()
    rest = Run(teacher, latents, schedule=REUSING).go(at, whole.kept)
    assert rest.losses == whole.losses[cut:]
    assert all(torch.equal(tensor, rest.weights[name]) for name, tensor in whole.weights.items())


def test_only_answers_can_be_reused() -> None:
    with pytest.raises(ValueError, match="`diffusion` has no answers to use again; set reuse: 1"):
        Phase(loss="diffusion", steps=1, lr=1e-3, reuse=2)


def test_checkpointing_changes_nothing(teacher: nn.Module, latents: Latents) -> None:
    plain = Run(teacher, latents).go()
    again = Run(teacher, latents, step=StepConfig(checkpointing=True)).go()
    assert again.losses == plain.losses


def test_compiled_blocks_learn_the_same(teacher: nn.Module, latents: Latents) -> None:
    """A span and a whole-model phase, with checkpointing. Inductor is left out: it takes minutes,
    and what could go wrong here is how blocks are traced."""
    phases = tuple(phase.model_copy(update={"steps": 1}) for phase in SCHEDULE.phases[:2])
    torch._dynamo.reset()
    counters.clear()
    learned: list[list[float]] = []
    for compiled in (False, True):
        student = Run(teacher, latents, step=StepConfig(checkpointing=True)).student
        observed, losses = Observed(FAMILY, copy.deepcopy(teacher)), []
        for module in (student, observed) if compiled else ():
            compile_blocks(module, backend="aot_eager")
        recover(
            student, observed, examples_of(latents, seed=3), Schedule(phases=phases),
            report=lambda _, loss, losses=losses: losses.append(loss),
        )  # fmt: skip
        learned.append(losses)
    assert learned[1] == pytest.approx(learned[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.slow
def test_blocks_stay_compiled_through_all_phases(teacher: nn.Module, latents: Latents) -> None:
    torch._dynamo.reset()
    counters.clear()
    student = Run(teacher, latents, step=StepConfig(checkpointing=True)).student
    observed = Observed(FAMILY, copy.deepcopy(teacher))
    for module in (student, observed):
        compile_blocks(module, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number, phase in enumerate(SCHEDULE.phases[:2]):
            set_trainable(student, phase)
            example = next(examples_of(latents, seed=3)(number, phase, 0))
            embeds_BMD, mask_BM = example.inputs.embeds_BMD, example.inputs.mask_BM
            assert mask_BM is not None
            for masked, tokens in product((False, True), (2, 3, 4)):
                cut_BM = mask_BM[:, :tokens] if masked else None
                inputs = replace(example.inputs, embeds_BMD=embeds_BMD[:, :tokens], mask_BM=cut_BM)
                backward(student, observed, replace(example, inputs=inputs), phase, alone)
    assert counters["stats"]["unique_graphs"] > 8


def test_the_average_follows_the_weights(teacher: nn.Module, latents: Latents) -> None:
    run = Run(teacher, latents, step=StepConfig(average=0.25))
    seen: list[Tensor] = []
    name = "student.proj_out.weight"

    def save(at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        seen.append(student.get_parameter(name).detach().clone())

    recover(
        run.student, Observed(FAMILY, teacher), examples_of(latents, 3), SCHEDULE, save=save
    )  # fmt: skip
    expected = seen[0]
    for steps, weight in enumerate(seen, start=1):
        kept = min(0.25, (1 + steps) / (10 + steps))
        expected = kept * expected + (1 - kept) * weight
    assert run.student.average is not None
    torch.testing.assert_close(run.student.average[name], expected)
    assert not torch.equal(expected, seen[-1])
    run.student.become_average()
    torch.testing.assert_close(run.student.get_parameter(name).detach(), expected)


@pytest.mark.parametrize("shape", [(32, 256), (128, 64)], ids=["rows of blocks", "short rows"])
def test_moments_in_8_bits_take_less_learn_nearly_the_same_and_go_on_exactly(
    shape: tuple[int, int],
) -> None:
    """On weights large enough to be quantised: torchao leaves those below 4096 values alone. Only
    `make test` installs it, because diffusers then imports it too, which takes seconds."""
    weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    other = torch.nn.Parameter(weight.detach().clone())
    optimizers = [make_optimizer("adamw", [weight], 1e-2), make_optimizer("adamw8bit", [other], 1)]
    set_rate(optimizers[1], 1e-2)
    for step in range(10):
        for parameter, optimizer in zip((weight, other), optimizers, strict=True):
            parameter.grad = torch.cos(parameter.detach() * (step + 1))
            optimizer.step()
    torch.testing.assert_close(other, weight, rtol=0, atol=0.02)
    held = moments(optimizers[1], other)
    assert held.keys() == {
        "step", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale"
    }  # fmt: skip
    if shape[1] == 256:
        assert sum(value.nbytes for value in held.values()) < 2 * 0.3 * weight.nbytes

    # As from a checkpoint.
    held = {kind: value.clone() for kind, value in held.items()}
    fresh, copied = torch.nn.Parameter(other.detach().clone()), other
    restored = make_optimizer("adamw8bit", [fresh], 1)
    set_moments(restored, {fresh: held})
    assert torch.equal(fresh, copied)
    for parameter, optimizer in ((copied, optimizers[1]), (fresh, restored)):
        set_rate(optimizer, 1e-2)
        parameter.grad = torch.sin(parameter.detach())
        optimizer.step()
    assert torch.equal(fresh, copied)


def test_moments_are_read_as_the_rows_of_their_weights_are_sharded(tmp_path: Path) -> None:
    """By the second of two ranks, of which the first is not there: reading sends nothing."""
    weight = torch.randn(6, 512)
    stored = {
        "student/weight": weight,
        "optimizer/step/weight": torch.tensor(3.0),
        "optimizer/exp_avg/weight": torch.randn(6, 512),
        "optimizer/exp_avg_sq.codes/weight": torch.randint(256, (6, 512), dtype=torch.uint8),
        "optimizer/exp_avg_sq.scale/weight": torch.rand(6, 2),
    }
    saver = Saver(open_store(str(tmp_path)), "run")
    saver.save(1, stored, None)
    saver.finish()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        student = nn.Linear(512, 6, bias=False)
        student.average = None  # type: ignore[assignment]  # as a student without one
        fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
        found = read_held(student, open_tensors(open_store(str(tmp_path)), "run/step-000000001"))  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(local(student.weight.detach()), weight[3:])
    assert found.keys() == stored.keys() - {"student/weight"}
    for name, moment in found.items():
        expected = stored[name] if name == "optimizer/step/weight" else stored[name][3:]
        assert local(moment).dtype == expected.dtype, name
        assert torch.equal(local(moment), expected), name


def test_8_bits_without_torchao_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit needs torchao.*pip install -e '\.\[8bit\]'"):
        StepConfig(optimizer="adamw8bit")


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
    backward(student, Observed(FAMILY, teacher), example, phase, alone)
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
    assert {name.split(".")[2] for name in found} == {str(i) for i in ends}
    assert_same_gradients(student, other)


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_a_span_phase_has_the_gradient_of_the_mean_over_replacements(
    teacher: nn.Module, latents: Latents, micro_batch: int | None
) -> None:
    """Against the loss written out over the whole batch at once."""
    phase = SCHEDULE.phases[0]
    example = next(examples_of(latents, seed=3)(0, phase, 0))
    assert example.inputs.mask_BM is not None
    other = Run(teacher, latents).student
    set_trainable(other, phase)
    states: list[State] = []
    Observed(FAMILY, teacher)(example.inputs, lambda edge, state: states.append(state))
    losses = []
    for place, block in other.replaced:
        first, last = block.span
        after = other(example.inputs, place, states[first])
        losses.append(
            span_loss(
                after, states[last + 1], example.inputs.mask_BM, phase.magnitude, text=last < 3
            )
        )
    expected = torch.stack(losses).mean()
    expected.backward()

    student = Run(teacher, latents, step=StepConfig(micro_batch=micro_batch)).student
    set_trainable(student, phase)
    loss = backward(student, Observed(FAMILY, teacher), example, phase, alone)
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(student, other)


@pytest.mark.parametrize("number", range(3), ids=lambda i: SCHEDULE.phases[i].loss)
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_micro_batches_add_up_to_the_batch(
    teacher: nn.Module, latents: Latents, number: int, inputs: str
) -> None:
    phase = SCHEDULE.phases[number].model_copy(update={"inputs": inputs, "batch_size": 5})
    example = next(examples_of(latents, seed=3)(number, phase, 0))
    losses, students = [], []
    for micro_batch in (None, 2):
        student = Run(teacher, latents, step=StepConfig(micro_batch=micro_batch)).student
        set_trainable(student, phase)
        losses.append(backward(student, Observed(FAMILY, teacher), example, phase, alone))
        students.append(student)
    torch.testing.assert_close(losses[1], losses[0])
    assert_same_gradients(*students)


def assert_same_gradients(student: nn.Module, other: nn.Module) -> None:
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


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
