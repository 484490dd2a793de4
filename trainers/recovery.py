"""Recovery: distils a whole finalist through the phases of its schedule. Plain torch.

Where work is placed stays behind callables: who shards, saves and reports is the caller's affair.
A run continues exactly from its position, weights and optimizer: what step s of phase p sees
depends on the seed, p and s alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from storage.errors import EspalierError
from storage.shards import dtypes
from storage.stored import StoredTensors
from trainers.data.latents import Latents, training_inputs
from trainers.distilled import Distilled, Observed
from trainers.losses import diffusion_loss, span_loss, velocity_loss
from trainers.optimizer import adamw, rate_at
from trainers.schedule import Phase, Schedule
from trainers.students.families.base import Inputs, State

_OPTIMIZER = "optimizer/"
_STUDENT = "student/"


class RecoveryError(EspalierError):
    """A recovery that cannot start or go on."""


class NanLossError(RecoveryError):
    """A loss or gradient that is not finite; this run ends, others go on."""


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
    optimizer_tensors: Mapping[str, Tensor] | None = None,
    save: Save = lambda at, student, optimizer: None,
    report: Callable[[Position, float], None] = lambda at, loss: None,
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:
    """Train the student in place from `at` until so many steps of the schedule are taken, or all.

    `optimizer_tensors` continues inside a phase: what `held_tensors` gave there. `report` gets each
    step's position and loss; `mean` averages a scalar over the ranks, when there are several.
    Raises NanLossError, naming phase and step, on every rank alike.
    """
    until = schedule.steps if until is None else until
    for number, phase in enumerate(schedule.phases):
        if number < at.phase or at.done(schedule) >= until:
            continue
        set_trainable(student, phase)
        optimizer = adamw((p for p in student.parameters() if p.requires_grad), phase.lr)
        if at.step > 0:
            if optimizer_tensors is None:
                raise ValueError(f"{at} is inside a phase: the optimizer's tensors are needed")
            restore_optimizer(student, optimizer, optimizer_tensors)
        source = examples(number, phase, at.step)
        while at.phase == number and at.done(schedule) < until:
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * rate_at(at.step, phase.steps, phase.warmup)
            loss = train_step(student, teacher, next(source), phase, optimizer, mean)
            if not math.isfinite(loss):
                raise NanLossError(
                    f"phase {number} ({phase.loss}), step {at.step}: the loss or its gradient is "
                    f"not finite; lower recover.space.phases[{number}].lr"
                )
            report(at, loss)
            at = at.after(schedule)
            save(at, student, optimizer)


def train_step(
    student: Distilled,
    teacher: Observed,
    example: Example,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    mean: Callable[[Tensor], Tensor],
) -> float:
    """One optimizer step; the loss before it, over all ranks. NaN, and no step, when the loss or
    the gradient's norm is not finite."""
    loss = phase_loss(student, teacher, example, phase)
    loss.backward()
    trained = [p for p in student.parameters() if p.grad is not None]
    norm = full(nn.utils.clip_grad_norm_(trained, phase.clip))
    value, norm_value = torch.stack([mean(loss.detach()), norm.detach()]).tolist()
    finite = math.isfinite(value) and math.isfinite(norm_value)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return cast("float", value) if finite else math.nan


def phase_loss(student: Distilled, teacher: Observed, example: Example, phase: Phase) -> Tensor:
    """The loss of one phase, of this rank's slice; over several ranks their mean is trained.

    `span` is the mean over replacements, each of which it reaches apart from the others (PPCL
    sums; AdamW does not see the difference).
    """
    if phase.loss == "span":
        return _span_loss(student, teacher, example.inputs, phase)
    velocity_BNC = cast("Tensor", student(example.inputs))
    if phase.loss == "velocity":
        return velocity_loss(velocity_BNC, cast("Tensor", teacher(example.inputs)))
    return diffusion_loss(velocity_BNC, example.clean_BNC, example.noise_BNC)


def set_trainable(student: Distilled, phase: Phase) -> None:
    """Frees what the phase trains and freezes the rest."""
    if phase.train == "all":
        student.requires_grad_(True)
        return
    if not student.replaced:
        raise RecoveryError(
            "the plan replaces no block, so there is no replacement to train; set train: all with "
            "another loss, or ask for a smaller budget"
        )
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

    Rank `rank` of `world` gets its slice of every batch; DataError when it cannot be cut equally.
    """

    def examples(phase: int, settings: Phase, start: int) -> Iterator[Example]:
        phase_seed = seed * 1009 + phase
        for batch in latents.batches(phase_seed, settings.batch_size, rank, world, start):
            batch = batch.to(device, dtype)
            inputs, noise_BNC = training_inputs(batch, phase_seed, settings.timestep_shift)
            yield Example(inputs, batch.clean_BNC, noise_BNC)

    return examples


def held_tensors(student: Distilled, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All weights, and the optimizer's moments, by name: the live ones, sharded where they are."""
    held: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        held[f"{_STUDENT}{name}"] = parameter.detach()
        if optimizer is not None:
            for key, value in optimizer.state.get(parameter, {}).items():
                held[f"{_OPTIMIZER}{key}/{name}"] = value
    return held


def student_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among held tensors, named as in the student model itself."""
    prefix = f"{_STUDENT}student."
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def restore_weights(student: Distilled, tensors: Mapping[str, Tensor]) -> None:
    """Puts held weights into the student."""
    for name, parameter in student.named_parameters():
        parameter.copy_(tensors[f"{_STUDENT}{name}"])


def restore_optimizer(
    student: Distilled, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts held moments into an optimizer that has not stepped yet."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    kinds = sorted({key.split("/")[1] for key in tensors if key.startswith(_OPTIMIZER)})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for kind in kinds:
                value = tensors.get(f"{_OPTIMIZER}{kind}/{names[parameter]}")
                if value is not None:  # a parameter that never had a gradient has no moments
                    optimizer.state[parameter][kind] = value.clone()


def read_held(student: Distilled, stored: StoredTensors) -> dict[str, Tensor]:
    """Reads stored weights into the student, and returns the optimizer's moments, sharded as the
    parameters are. DamagedError names a file that is not whole."""
    parameters = dict(student.named_parameters())
    moments: dict[str, Tensor] = {}
    for key, entry in stored.index.items():
        if key.startswith(_OPTIMIZER):
            parameter = parameters[key.split("/", 2)[2]].detach()
            like = entry.shape == tuple(parameter.shape) and parameter.dim() > 0
            moments[key] = (
                torch.empty_like(parameter)
                if like
                else torch.empty(entry.shape, dtype=dtypes()[entry.dtype], device=parameter.device)
            )
    stored.fill({**held_tensors(student, None), **moments})
    return moments


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _span_loss(student: Distilled, teacher: Observed, inputs: Inputs, phase: Phase) -> Tensor:
    spans = [replaced.block.span for replaced in student.replaced]
    edges = {edge for first, last in spans for edge in (first, last + 1)}
    states = cast("dict[int, State]", teacher(inputs, edges))
    before = "own" if phase.inputs == "student" else [states[first] for first, _ in spans]
    after = cast("tuple[State, ...]", student(inputs, before))
    losses = [
        span_loss(
            state,
            states[last + 1],
            inputs.mask_BM,
            phase.magnitude,
            text=last + 1 < len(teacher.blocks),
        )
        for state, (_, last) in zip(after, spans, strict=True)
    ]
    return torch.stack(losses).mean()
