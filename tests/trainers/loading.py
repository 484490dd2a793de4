"""Prints by how much the memory of rank 0 of a group grows as it loads teacher and student.

    python -m tests.trainers.loading FOLDER WORLD

The other ranks are not there: loading sends nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainers import sharded
from trainers.distilled import Distilled
from trainers.students.families import family_named
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher


def main(folder: Path, world: int) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    sharded.SMALLEST_UNIT = 0
    cpu, family = torch.device("cpu"), family_named("qwen_image")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    teacher = Teacher("", folder, "", "", family, config)
    blocks = family.blocks(config)
    pairs = tuple(BlockPlan(span=(i, i + 1), start="average") for i in range(0, blocks, 2))
    plan = Plan(family=family.name, teacher_blocks=blocks, blocks=pairs)
    # Once without weights, so that what is imported late does not count.
    sharded.shard(Distilled(family, family.build(config, plan, "meta"), plan), cpu, torch.float32)
    # Without this the peak is that of the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    student = sharded.load_distilled(teacher, plan, None, cpu)
    observed = sharded.load_observed(teacher, cpu, sharded=True)
    print(json.dumps({"grown": peak() - before}))
    del student, observed


def peak() -> int:
    """The most bytes that were resident so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
