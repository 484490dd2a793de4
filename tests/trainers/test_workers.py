"""Recovery on several workers: what their number changes, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor

from storage.checkpoint import Saver, latest_checkpoint
from storage.store import open_store
from tests.trainers.ranks import full, on_ranks
from tests.trainers.students.tiny import QWEN_IMAGE
from trainers import sharded
from trainers.data.latents import Latents, Shard
from trainers.distilled import Distilled, Observed
from trainers.recovery import (
    Position,
    examples_of,
    held_tensors,
    read_held,
    recover,
    train_step,
)
from trainers.schedule import Phase, Schedule, StepConfig
from trainers.students.plan import BlockPlan
from trainers.students.surgery import assemble
from trainers.teacher import Teacher

PLAN = QWEN_IMAGE.plan(
    BlockPlan(span=(0, 0)),
    BlockPlan(span=(1, 2)),
    BlockPlan(span=(3, 3), text="projected"),
    BlockPlan(span=(4, 5), ffn=0.5),
)
SCHEDULE = Schedule(
    phases=(
        Phase(loss="span", steps=2, lr=1e-3, batch_size=5, warmup=0),
        Phase(loss="span", steps=2, lr=1e-3, batch_size=6, warmup=0, inputs="student"),
        Phase(loss="velocity", train="all", steps=3, lr=1e-3, batch_size=5, warmup=0),
    )
)


def latents() -> Latents:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 5, (14,), generator=generator)
    shard = Shard(
        latents=torch.randn(14, 16, 4, 4, generator=generator),
        embeds=torch.randn(14, 4, 12, generator=generator),
        mask=torch.arange(4) < lengths[:, None],
        captions=tuple(map(str, range(14))),
    )
    return Latents([shard], held_out=2)


def stored_teacher(folder: Path) -> Teacher:
    """The tiny teacher with a transformer of its own on disk, and nothing else."""
    return Teacher("tiny", folder, "", "", QWEN_IMAGE.family, QWEN_IMAGE.config)


STEP = StepConfig(micro_batch=2, checkpointing=True, average=0.5)
CUT = Position(2, 1)


def recovered(
    folder: str, smallest: int | None, begin: bool = True, end: bool = True
) -> dict[str, list[float]]:
    """The losses of all steps, and a sum over each weight at the end; on one rank unsharded.

    Without an `end` it stops at the cut and leaves a checkpoint there, without a `begin` it goes on
    from that.
    """
    grouped = torch.distributed.is_initialized()
    rank, world = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if grouped else (0, 1)
    )
    model = stored_teacher(Path(folder)).transformer()
    student = Distilled(QWEN_IMAGE.family, assemble(model, PLAN).float(), PLAN, STEP)
    teacher = Observed(QWEN_IMAGE.family, model)

    def mean(value: Tensor) -> Tensor:
        if grouped:
            torch.distributed.all_reduce(value := value.clone())
        return value / world

    if smallest is not None:
        sharded.SMALLEST_UNIT = smallest
        cpu, stored = torch.device("cpu"), stored_teacher(Path(folder))
        student = sharded.load_distilled(stored, PLAN, None, cpu, STEP)
        teacher = sharded.load_observed(stored, cpu, sharded=True)
    store, at, tensors = open_store(folder), Position(), None
    if not begin:
        held: dict[str, Tensor] = {}
        found = latest_checkpoint(
            store, "checkpoints", lambda c: held.update(read_held(student, c.tensors))
        )
        assert found is not None
        at, tensors = CUT, held
    losses: list[float] = []

    def save(at: Position, student: Distilled, optimizer: torch.optim.Optimizer) -> None:
        if at == CUT and not end:
            saver = Saver(store, "checkpoints", rank=rank, world=world)
            saver.save(1, held_tensors(student, optimizer), None)
            saver.finish()

    recover(
        student,
        teacher,
        examples_of(latents(), 5, rank, world),
        SCHEDULE,
        at,
        until=None if end else CUT.done(SCHEDULE),
        optimizer_tensors=tensors,
        save=save,
        report=lambda _, loss: losses.append(loss),
        mean=mean,
    )
    tensors = {name: full(held) for name, held in held_tensors(student, None).items()}
    return {"losses": losses} | {
        name: [tensor.sum().item(), tensor.square().sum().item()]
        for name, tensor in tensors.items()
    }


def change(folder: str, clip: float) -> float:
    """How far a step goes that is as long as the clipped gradient."""
    grouped = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), 2) if grouped else (0, 1)
    model = stored_teacher(Path(folder)).transformer()
    student = Distilled(QWEN_IMAGE.family, assemble(model, PLAN).float(), PLAN)
    if grouped:
        sharded.shard(student, torch.device("cpu"), torch.float32)

    def mean(value: Tensor) -> Tensor:
        if grouped:
            torch.distributed.all_reduce(value := value.clone())
        return value / world

    phase = Phase(loss="velocity", train="all", steps=1, lr=1.0, batch_size=6, clip=clip)
    before = [full(p.detach()).clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(student.requires_grad_(True).parameters(), lr=1.0)
    example = next(examples_of(latents(), 5, rank, world)(0, phase, 0))
    train_step(student, Observed(QWEN_IMAGE.family, model), example, phase, optimizer, mean)
    after = [full(p.detach()) for p in student.parameters()]
    pairs = zip(before, after, strict=True)
    return sum((b - a).double().square().sum().item() for b, a in pairs) ** 0.5


def changes(folder: str) -> list[float]:
    """Of a gradient that is clipped, and of one that is not."""
    return [change(folder, 0.01), change(folder, 1e6)]


def test_a_gradient_is_clipped_by_its_norm_over_all_workers(tmp_path: Path) -> None:
    QWEN_IMAGE.model().save_pretrained(tmp_path / "transformer")
    clipped, whole = changes(str(tmp_path))
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert whole > 0.1
    for found in on_ranks(2, changes, tmp_path, str(tmp_path)):
        assert found == pytest.approx([clipped, whole], rel=1e-3)


def on_two(folder: str) -> list[dict[str, list[float]]]:
    """Every block sharded on its own, and all of them together; then only up to the cut."""
    return [
        recovered(folder, 0), recovered(folder, 2**22), recovered(folder, 2**22, end=False)
    ]  # fmt: skip


def test_the_number_of_workers_changes_no_more_than_float_noise(tmp_path: Path) -> None:
    """Captions differ in length and workers have unequally many pictures. What each worker has it
    has read from the files by itself. What two have begun, one goes on with."""
    QWEN_IMAGE.model().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    expected = recovered(str(tmp_path), None)
    one, other = on_ranks(2, on_two, tmp_path, str(tmp_path))
    assert one == other
    *whole, begun = one
    ended = recovered(str(tmp_path), None, begin=False)
    whole.append({**ended, "losses": begun["losses"] + ended["losses"]})
    for found in whole:
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=3e-4, abs=3e-5), name
