"""Recovery: distils a whole finalist through the phases of its schedule. Plain torch.

Where work is placed stays behind callables: who shards, saves and reports is the caller's affair.
A run continues exactly from its position, weights and optimizer: what step s of phase p sees
depends on the seed, p and s alone.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from storage.errors import EspalierError
from storage.shards import dtypes
from storage.stored import StoredTensors
from trainers.data.latents import Latents, shares, training_inputs
from trainers.distilled import Distilled, Observed, detached, joined, local
from trainers.losses import Totals, diffusion_loss, span_loss, totals, velocity_loss
from trainers.optimizer import (
    make_optimizer,
    moments,
    placed,
    rate_at,
    scale,
    set_moments,
    set_rate,
    squared_norm,
)
from trainers.schedule import NOTHING_REPLACED, Phase, Schedule, StepConfig
from trainers.spikes import RECENT, is_spike
from trainers.students.families.base import Inputs, State

Mean = Callable[[Tensor], Tensor]
"""The mean of a tensor over all ranks; every rank calls it equally often."""

_OPTIMIZER = "optimizer/"
_GROUP = 8
"""Batches of which the teacher's answers are held when each is used several times: far enough apart
for a step not to learn from what the one before it saw."""

_STUDENT = "student/"
_AVERAGE = "average/"


class RecoveryError(EspalierError):
    """A recovery that cannot start or go on."""


class DivergedError(RecoveryError):
    """A loss from which training had better go back."""


class NanLossError(DivergedError):
    """A loss or gradient that is not finite; this run ends, others go on."""


class LossSpikeError(DivergedError):
    """A loss far above those before it."""


@dataclass(frozen=True)
class Start:
    """Where training starts, or goes on: what a checkpoint holds."""

    at: Position
    losses: Sequence[float] = ()
    """Of all steps so far."""
    optimizer_tensors: dict[str, Tensor] | None = None
    """The moments that `held_tensors` gave, when `at` is inside a phase. Who goes on from here
    takes them out: kept here as well, they would be in memory to the end."""
    rollbacks: int = 0
    """How often training had gone back before."""


@dataclass(frozen=True)
class Position:
    """The next step to take; at the end `phase` is the number of phases."""

    phase: int = 0
    step: int = 0
    """Within the phase."""

    def after(self, schedule: Schedule) -> Position:
        """The step after this one, in the next phase when this one is at its end."""
        if self.step + 1 < schedule.phases[self.phase].steps:
            return Position(self.phase, self.step + 1)
        return Position(self.phase + 1, 0)

    def done(self, schedule: Schedule) -> int:
        """Optimizer steps taken so far, over all phases."""
        return sum(phase.steps for phase in schedule.phases[: self.phase]) + self.step


@dataclass(frozen=True)
class Example:
    """What one step learns from. Shapes: B batch, N tokens, C channels of a packed token."""

    inputs: Inputs
    clean_BNC: Tensor
    noise_BNC: Tensor
    fewest: int | None = None
    most: int | None = None
    """Pictures that the ranks have of this step; None when all have as many as these."""
    weight: float = 1.0
    """What makes the mean over ranks that have unequally many one over pictures."""
    answers: dict[int, Tensor] | None = None
    """The teacher's velocity_BNC of parts of this batch, by their first picture, as far as they are
    known; None where nobody will ask for them again."""


class Examples(Protocol):
    """Where examples come from."""

    def __call__(self, phase: int, settings: Phase, start: int) -> Iterator[Example]:
        """Those of phase number `phase` from step `start` on; the same for the same arguments."""


class Save(Protocol):
    """Called after every step; decides itself when a checkpoint is due."""

    def __call__(self, at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        """`at` is where a continuation would start."""


def recover(
    student: Distilled,
    teacher: Observed,
    examples: Examples,
    schedule: Schedule,
    at: Position = Position(),
    *,
    until: int | None = None,
    past: Sequence[float] = (),
    rate: float = 1.0,
    spike: float | None = None,
    optimizer_tensors: dict[str, Tensor] | None = None,
    save: Save = lambda at, student, optimizer: None,
    report: Callable[[Position, float], None] = lambda at, loss: None,
    mean: Mean = lambda value: value,
) -> None:
    """Train the student in place from `at` until so many steps of the schedule are taken, or all.

    The schedule's learning rates are multiplied by `rate`. A loss `spike` times the median of those
    before it, of which `past` has the ones before `at`, raises LossSpikeError.
    `optimizer_tensors` continues inside a phase: what `held_tensors` gave there, of which the
    moments are taken out and become the optimizer's own. `report` gets each step's position and
    loss; `mean` averages over the ranks, when there are several.
    Raises NanLossError, naming phase and step, on every rank alike.
    """
    until = schedule.steps if until is None else until
    for number, phase in enumerate(schedule.phases):
        if number < at.phase or at.done(schedule) >= until:
            continue
        set_trainable(student, phase)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = make_optimizer(student.step.optimizer, trained, phase.lr)
        if at.step > 0:
            if optimizer_tensors is None:
                raise ValueError(f"{at} is inside a phase: the optimizer's tensors are needed")
            restore_optimizer(student, optimizer, optimizer_tensors)
        source = examples(number, phase, at.step)
        recent = deque(past[len(past) - min(at.step, len(past)) :], maxlen=RECENT)
        while at.phase == number and at.done(schedule) < until:
            set_rate(optimizer, rate * phase.lr * rate_at(at.step, phase.steps, phase.warmup))
            loss = train_step(student, teacher, next(source), phase, optimizer, mean)
            if not math.isfinite(loss):
                raise NanLossError(
                    f"phase {number} ({phase.loss}), step {at.step}: the loss or its gradient is "
                    f"not finite; lower recover.space.phases[{number}].lr"
                )
            if spike and is_spike(loss, recent, spike):
                raise LossSpikeError(
                    f"phase {number} ({phase.loss}), step {at.step}: the loss rose to {loss:.3g}, "
                    f"over {spike:g} times the median of the {RECENT} steps before it; lower "
                    f"recover.space.phases[{number}].lr"
                )
            recent.append(loss)
            report(at, loss)
            at = at.after(schedule)
            student.follow(at.done(schedule))
            save(at, student, optimizer)


def recover_steadily(
    run: Callable[[Start, float, float | None], None],
    start: Start,
    go_back: Callable[[], Start],
    step: StepConfig,
    said: Callable[[str], None] = lambda reason: None,
) -> None:
    """Calls `run` with where to start, the share of the learning rate, and what a spike is, until
    it comes through; after each divergence it goes back and on at half the rate, `step.rollbacks`
    times at most, those of the start among them. `said` gets each reason. Raises NanLossError when
    that did not help."""
    for rollback in range(min(start.rollbacks, step.rollbacks), step.rollbacks + 1):
        left = step.rollbacks - rollback
        start = replace(start, rollbacks=rollback)
        try:
            return run(start, 0.5**rollback, step.spike if left else None)
        except DivergedError as error:
            if not left:
                raise
            said(str(error))
        start = go_back()
    return None


def train_step(
    student: Distilled,
    teacher: Observed,
    example: Example,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    mean: Mean,
) -> float:
    """One optimizer step; the loss before it, over all ranks. NaN, and no step, when the loss or
    the gradient's norm is not finite."""
    loss = backward(student, teacher, example, phase, mean)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    squares = squared_norm(gradients)
    if isinstance(gradients[0], DTensor):  # the ranks hold parts: their sum is asked for
        squares = squares * gradients[0].device_mesh.size()
    # Once for both: to wait for the other ranks costs more than what is sent.
    value, squared = mean(torch.stack([loss.detach(), squares])).tolist()
    finite = math.isfinite(value) and math.isfinite(squared)
    if finite:
        scale(gradients, min(1.0, phase.clip / (math.sqrt(squared) + 1e-6)))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return cast("float", value) if finite else math.nan


def backward(
    student: Distilled,
    teacher: Observed,
    example: Example,
    phase: Phase,
    mean: Mean,
) -> Tensor:
    """Adds the gradient of one phase's loss; the loss of this rank's slice, whose mean over the
    ranks is the loss of the whole batch.

    At most `student.step.micro_batch` pictures have a graph at a time, and of `span` one
    replacement. Its loss is the mean over replacements, each of which it reaches apart from the
    others (PPCL sums; AdamW does not see the difference).
    """
    count = len(example.clean_BNC)
    parts = _parts(example, student.step.micro_batch)
    if phase.loss == "span":
        return _span_backward(student, teacher, example.inputs, phase, mean, parts)
    total = example.clean_BNC.new_zeros((), dtype=torch.float32)
    velocity = phase.loss == "velocity"
    for rows in parts:
        inputs = example.inputs.rows(rows)
        # The teacher first: its pass then takes no memory beside the student's graph.
        aim_BNC = _answer(teacher, inputs, example.answers, rows) if velocity else None
        velocity_BNC = cast("Tensor", student(inputs))
        if aim_BNC is not None:
            loss = velocity_loss(velocity_BNC, aim_BNC)
        else:
            clean_BNC, noise_BNC = example.clean_BNC[rows], example.noise_BNC[rows]
            loss = diffusion_loss(velocity_BNC, clean_BNC, noise_BNC)
        loss = loss * (example.weight * len(velocity_BNC) / count)
        _reduce_root(student, last=rows is parts[-1])
        loss.backward()
        total += loss.detach()
    return total


def _answer(
    teacher: Observed, inputs: Inputs, known: dict[int, Tensor] | None, rows: slice
) -> Tensor:
    """The teacher's velocity_BNC; every rank knows the same parts, since all have taken the same
    steps."""
    if known is None:
        return cast("Tensor", teacher(inputs))
    if rows.start not in known:
        known[rows.start] = cast("Tensor", teacher(inputs))
    return known[rows.start]


def _parts(example: Example, micro_batch: int | None) -> list[slice]:
    """Which pictures pass together. As many parts on every rank, since all take part in each."""
    count = len(example.clean_BNC)
    fewest, most = example.fewest or count, example.most or count
    number = min(math.ceil(most / (micro_batch or most)), fewest)
    return [slice(first, last) for first, last in shares(count, number)]


def set_trainable(student: Distilled, phase: Phase) -> None:
    """Frees what the phase trains and freezes the rest."""
    if phase.train == "all":
        student.requires_grad_(True)
        return
    if not student.replaced:
        raise RecoveryError(NOTHING_REPLACED)
    student.requires_grad_(False)
    for replaced in student.replaced:
        student.blocks[replaced.place].requires_grad_(True)


def examples_of(
    latents: Latents,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Examples:
    """Examples from encoded pictures; every phase sees them in an order and with noise of its own.

    Rank `rank` of `world` gets its slice of every batch; DataError when there are more ranks than
    pictures.
    """

    def examples(phase: int, settings: Phase, start: int) -> Iterator[Example]:
        phase_seed, size = seed * 1009 + phase, settings.batch_size
        numbers = batch_numbers(settings.reuse, start)
        known: dict[int, dict[int, Tensor]] = {}
        for batch in latents.batches(phase_seed, size, rank, world, numbers):
            answers = None
            if settings.reuse > 1:
                group = batch.step // _GROUP
                known = {number: a for number, a in known.items() if number // _GROUP == group}
                answers = known.setdefault(batch.step, {})
            batch = batch.to(device, dtype)
            inputs, noise_BNC = training_inputs(batch, phase_seed, settings.timestep_shift)
            counts = [last - first for first, last in shares(size, world)]
            least, most, weight = min(counts), max(counts), len(batch) * world / size
            yield Example(inputs, batch.clean_BNC, noise_BNC, least, most, weight, answers)

    return examples


def batch_numbers(reuse: int, start: int) -> Iterator[int]:
    """Which batch each step learns from, from step `start` on: every group of batches `reuse`
    times, and then the next."""
    for step in itertools.count(start):
        group, place = divmod(step, _GROUP * reuse)
        yield group * _GROUP + place % _GROUP


def held_tensors(student: Distilled, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All weights, their average, and the optimizer's moments, by name: the live ones, sharded
    where they are."""
    held: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        held[f"{_STUDENT}{name}"] = parameter.detach()
        if student.average is not None:
            held[f"{_AVERAGE}{name}"] = student.average[name]
        if optimizer is not None:
            for key, value in moments(optimizer, parameter).items():
                held[f"{_OPTIMIZER}{key}/{name}"] = value
    return held


def student_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among held tensors, named as in the student model itself."""
    prefix = f"{_STUDENT}student."
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def restore_weights(student: Distilled, tensors: Mapping[str, Tensor]) -> None:
    """Puts held weights and their average into the student."""
    averages = {}
    for name, parameter in student.named_parameters():
        parameter.copy_(tensors[f"{_STUDENT}{name}"])
        if f"{_AVERAGE}{name}" in tensors:
            averages[name] = tensors[f"{_AVERAGE}{name}"].clone()
    student.average = averages or None


def restore_optimizer(
    student: Distilled, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Moves held moments out of `tensors` into an optimizer that has not stepped yet."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    kinds = sorted({key.split("/")[1] for key in tensors if key.startswith(_OPTIMIZER)})
    held: dict[nn.Parameter, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for kind in kinds:
                value = tensors.pop(f"{_OPTIMIZER}{kind}/{names[parameter]}", None)
                if value is not None:  # a parameter that never had a gradient has no moments
                    held.setdefault(parameter, {})[kind] = value
    set_moments(optimizer, held)


def read_held(student: Distilled, stored: StoredTensors) -> dict[str, Tensor]:
    """Reads stored weights and their average into the student, and returns the optimizer's moments,
    sharded as the parameters are. DamagedError names a file that is not whole."""
    parameters = dict(student.named_parameters())
    made: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    for key, entry in stored.index.items():
        _, _, name = key.partition("/")
        if key.startswith(_OPTIMIZER):
            parameter = parameters[name.partition("/")[2]].detach()
            made[key] = _room(parameter, entry.shape, dtypes()[entry.dtype])
        elif key.startswith(_AVERAGE):
            averages[name] = torch.empty_like(parameters[name].detach())
    student.average = averages or None
    stored.fill({**held_tensors(student, None), **made})
    return made


def _room(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a moment; one that has as many rows as its parameter is sharded by them like it, as the
    scales of quantised moments are, which are narrower."""
    if parameter.dim() == 0 or shape[:1] != parameter.shape[:1]:
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    mine = (len(local(parameter)), *shape[1:])
    return placed(torch.empty(mine, dtype=dtype, device=parameter.device), parameter)


def _span_backward(
    student: Distilled,
    teacher: Observed,
    inputs: Inputs,
    phase: Phase,
    mean: Mean,
    parts: Sequence[slice],
) -> Tensor:
    """Walks the teacher once; where it passes the end of a span, the student's block for the span
    runs, forward and backward, before the teacher goes on: neither graphs nor states pile up."""
    own = phase.inputs == "student"
    blocks = student.placed if own else student.replaced
    ends = {block.span[1] + 1: (place, block) for place, block in blocks}
    starts = {block.span[0] for _, block in blocks}
    last = student.replaced[-1].block.span[1] + 1
    total = inputs.noisy_BNC.new_zeros((), dtype=torch.float32)
    # FSDP puts a gradient off in float32 and takes the last as computed: it reduces no mixture.
    low = inputs.noisy_BNC.dtype != torch.float32
    before: State | None = None

    def visit(edge: int, state: State) -> None:
        nonlocal before
        if edge in ends:
            place, block = ends[edge]
            whole = None if block.untouched else _whole(state, inputs.mask_BM, mean)
            after = []
            for rows in parts:
                part, start = inputs.rows(rows), before.rows(rows) if before else None
                with torch.set_grad_enabled(whole is not None):
                    reached = cast("State", student(part, place, start))
                    if whole is not None:
                        text = edge < len(teacher.blocks)
                        aim, mask_BM = state.rows(rows), part.mask_BM
                        loss = span_loss(reached, aim, mask_BM, phase.magnitude, text, whole)
                        loss = loss / len(student.replaced)
                        _reduce_root(student, last=low or (edge == last and rows is parts[-1]))
                        loss.backward()
                        total.add_(loss.detach())
                if own:
                    after.append(detached(reached))
            before = joined(after) if own else None
        if not own and edge in starts:
            before = state

    teacher(inputs, visit, last)
    return total


def _whole(state: State, mask_BM: Tensor | None, mean: Mean) -> tuple[Totals, Totals]:
    """Of text and image, the totals of a whole batch, a rank's share of them."""
    text, image = totals(state.text_BMD, mask_BM), totals(state.image_BND)
    shared = mean(torch.stack([*text, *image]))
    return Totals(*shared[:2]), Totals(*shared[2:])


def _reduce_root(student: Distilled, last: bool) -> None:
    """Of a sharded student, what belongs to no block's own shards is gathered and its gradient
    reduced once a step, at the `last` backward pass; a block's own shards are at each, because
    whole gradients of all blocks would not fit beside the model."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(last, recurse=False)
        student.set_reshard_after_backward(last, recurse=False)
