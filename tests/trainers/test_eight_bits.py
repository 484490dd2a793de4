"""Moments in 8 bits on several ranks, and on another number of them: which are quantised depends on
how rows fall to ranks, and must be the same on all.

Ranks are taken one by one, each in a group whose others are not there: neither a step of the
optimizer nor a checkpoint sends anything between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from storage.checkpoint import Checkpoint, Saver, latest_checkpoint
from storage.shards import part_of
from storage.store import open_store
from trainers.distilled import local
from trainers.optimizer import make_optimizer, set_rate
from trainers.recovery import held_tensors, read_held, restore_optimizer

SHAPES = {
    "whole": (40, 512),  # quantised everywhere
    "narrow": (368, 64),  # by 4 ranks; of 5, torchao would do so on the last alone
    "vector": (17408,),  # by 4 ranks, not by 5
    "short": (3, 8192),  # has fewer rows than there are ranks
    "small": (64,),  # nowhere
}
RATE = 1e-2


class Weights(nn.Module):
    """Weights of those shapes; a student without an average."""

    average = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its step anew for every shape of a shard: seconds each."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[tuple[Weights, torch.optim.Optimizer]]:
    """What one rank has of the weights, and their optimizer."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        # DTensor remembers the mesh of an earlier rank, unless this one differs in something.
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(f"rank {rank}",))
        student = Weights()
        fully_shard(student, mesh=mesh)
        optimizer = make_optimizer("adamw8bit", student.parameters(), RATE)
        set_rate(optimizer, RATE)
        yield student, optimizer
    finally:
        torch.distributed.destroy_process_group()


def stepped(student: Weights, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step, whose gradient follows from a weight and the number of the step."""
    for parameter in student.parameters():
        parameter.grad = torch.cos(parameter.detach() * (number + 1))
    optimizer.step()


def save(folder: Path, world: int) -> None:
    """A checkpoint of all ranks after three steps."""
    savers = []
    for rank in range(world):
        with rank_of(rank, world) as (student, optimizer):
            for number in range(3):
                stepped(student, optimizer, number)
            savers.append(Saver(open_store(str(folder)), "run", rank=rank, world=world))
            savers[-1].save(3, held_tensors(student, optimizer), None)  # type: ignore[arg-type]
    for saver in savers:
        saver.finish()


def gone_on(folder: Path, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The moments that so many ranks read from the checkpoint, and the weights a step later, put
    together from all ranks."""
    moments: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for rank in range(world):
        with rank_of(rank, world) as (student, optimizer):
            held: dict[str, Tensor] = {}

            def load(checkpoint: Checkpoint, student: Any = student, held: Any = held) -> None:
                held.update(read_held(student, checkpoint.tensors))

            assert latest_checkpoint(open_store(str(folder)), "run", load) is not None
            restore_optimizer(student, optimizer, held)  # type: ignore[arg-type]
            for name, parameter in student.named_parameters():
                for kind in ("exp_avg", "exp_avg_sq"):
                    moment: Any = local(optimizer.state[parameter][kind])
                    value = moment if type(moment) is Tensor else moment.dequantize()
                    put(moments, f"{kind} of {name}", parameter, value)
            stepped(student, optimizer, 3)
            for name, parameter in student.named_parameters():
                put(weights, name, parameter, local(parameter.detach()))
    return moments, weights


def put(into: dict[str, Tensor], name: str, parameter: Tensor, rows: Tensor) -> None:
    """This rank's rows into the whole, which has NaN where no rank has any."""
    whole = into.setdefault(name, torch.full(parameter.shape, torch.nan))
    first = part_of(parameter.detach()).offsets[0]
    whole[first : first + len(rows)] = rows


@pytest.mark.parametrize(("written", "read"), [(5, 5), (4, 5), (5, 4)])
def test_a_checkpoint_is_read_by_any_number_of_ranks_to_8_bits(
    tmp_path: Path, written: int, read: int
) -> None:
    save(tmp_path, written)
    moments, weights = gone_on(tmp_path, written)
    found, stepped_weights = gone_on(tmp_path, read)
    for name, moment in moments.items():
        # Codes are at most 1.43% of their block's largest value apart.
        most = 0.0 if read == written else 0.0075 * moment.abs().max().item()
        torch.testing.assert_close(found[name], moment, rtol=0, atol=most)
    for name, weight in weights.items():
        difference = (stepped_weights[name] - weight).abs().mean().item()
        assert difference <= (0.0 if read == written else 0.02 * RATE), name
