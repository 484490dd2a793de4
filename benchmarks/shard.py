"""A recovery step with every block sharded on its own, and with small blocks sharded together.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m benchmarks.shard examples/miniature.yaml

Needs what `make demo` left. Prints one JSON object a batch size and way of sharding.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed

from cluster.cli.common import open_config
from search.sweep import Sweep
from storage.registry import best
from trainers import sharded
from trainers.data.latents import open_latents
from trainers.distilled import Distilled, Observed
from trainers.optimizer import adamw
from trainers.recovery import examples_of, set_trainable, train_step
from trainers.schedule import Phase
from trainers.students.plan import Plan
from trainers.students.surgery import assemble

WARM = 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    options = arguments.parse_args()
    torch.distributed.init_process_group("gloo")
    sweep = open_config(options.config, [])
    together = sharded.SMALLEST_UNIT
    for batch in options.batches:
        for smallest in (0, together):
            sharded.SMALLEST_UNIT = smallest
            seconds = step_time(sweep, batch, options.steps)
            if torch.distributed.get_rank() == 0:
                way = "together" if smallest else "block by block"
                said = {"batch": batch, "sharded": way, "ms_per_step": round(1000 * seconds, 1)}
                print(json.dumps(said), flush=True)


def step_time(sweep: Sweep, batch: int, steps: int) -> float:
    """Seconds of one velocity step of the first budget's published plan, freshly cut."""
    family, teacher = sweep.teacher.family, sweep.teacher.transformer()
    label = sweep.config.budgets[0].label
    entry = best(sweep.store, label, sweep.teacher.digest)
    assert entry is not None, label
    with sweep.store.read(f"{entry.model}/plan.json") as stream:
        plan = Plan.from_json(stream.read())
    first = tuple(block.model_copy(update={"start": "first"}) for block in plan.blocks)
    plan = plan.model_copy(update={"blocks": first})
    student = Distilled(family, assemble(teacher, plan).float(), plan)
    sharded.shard(student, torch.device("cpu"), torch.float32)
    observed = Observed(family, teacher)
    phase = Phase(loss="velocity", train="all", steps=steps + WARM, lr=2e-3, batch_size=batch)
    set_trainable(student, phase)
    optimizer = adamw(student.parameters(), phase.lr)
    latents = open_latents(sweep.store, sweep.encoded_prefix)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    examples = examples_of(latents, 0, rank, world)(0, phase, 0)

    def mean(loss: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(loss)
        return loss / world

    for step, example in enumerate(islice(examples, steps + WARM)):
        if step == WARM:
            started = time.perf_counter()
        train_step(student, observed, example, phase, optimizer, mean)
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    main()
