"""Recovery on several workers: what their number changes, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor

from tests.trainers.ranks import on_ranks
from tests.trainers.students.tiny import QWEN_IMAGE
from trainers import sharded
from trainers.data.latents import Latents, Shard
from trainers.distilled import Distilled, Observed
from trainers.recovery import examples_of, recover, snapshot, student_weights
from trainers.schedule import Phase, Schedule
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
        Phase(loss="span", steps=2, lr=1e-3, batch_size=6, warmup=0),
        Phase(loss="span", steps=2, lr=1e-3, batch_size=6, warmup=0, inputs="student"),
        Phase(loss="velocity", train="all", steps=2, lr=1e-3, batch_size=6, warmup=0),
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


def recovered(folder: str, smallest: int | None) -> dict[str, list[float]]:
    """The losses of all steps, and a sum over each weight at the end; on one rank unsharded."""
    grouped = torch.distributed.is_initialized()
    rank, world = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if grouped else (0, 1)
    )
    model = stored_teacher(Path(folder)).transformer()
    student = Distilled(QWEN_IMAGE.family, assemble(model, PLAN).float(), PLAN)
    teacher = Observed(QWEN_IMAGE.family, model)

    def mean(value: Tensor) -> Tensor:
        if grouped:
            torch.distributed.all_reduce(value := value.clone())
        return value / world

    if smallest is not None:
        sharded.SMALLEST_UNIT = smallest
        cpu, stored = torch.device("cpu"), stored_teacher(Path(folder))
        student = sharded.load_distilled(stored, PLAN, None, cpu)
        teacher = sharded.load_observed(stored, cpu, sharded=True)
    losses: list[float] = []
    recover(
        student,
        teacher,
        examples_of(latents(), 5, rank, world),
        SCHEDULE,
        report=lambda _, loss: losses.append(loss),
        mean=mean,
    )
    weights = student_weights(snapshot(student, None))
    return {"losses": losses} | {
        name: [tensor.sum().item(), tensor.square().sum().item()]
        for name, tensor in weights.items()
    }


def both(folder: str) -> list[dict[str, list[float]]]:
    """Every block sharded on its own, and all of them together."""
    return [recovered(folder, 0), recovered(folder, 2**22)]


def test_more_workers_change_no_more_than_float_noise(tmp_path: Path) -> None:
    """Captions differ in length, so that the workers' slices hold different numbers of tokens.
    What each worker has it has read from the files by itself."""
    QWEN_IMAGE.model().save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    expected = recovered(str(tmp_path), None)
    one, other = on_ranks(2, both, tmp_path, str(tmp_path))
    assert one == other
    for found in one:
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=2e-4, abs=2e-5), name
