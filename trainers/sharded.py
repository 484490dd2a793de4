"""Student and teacher spread over all ranks: built empty, sharded, then filled shard by shard.

No rank ever holds a whole model, but for a teacher that is not sharded. Plain torch: a process
group must be there, Ray need not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trainers.distilled import Distilled, Observed, compile_blocks
from trainers.schedule import PLAIN, StepConfig
from trainers.students.plan import Plan
from trainers.students.surgery import Library
from trainers.weights import StreamedBlocks, fill, fill_student

if TYPE_CHECKING:
    from trainers.teacher import Teacher

SMALLEST_UNIT = 2**22
"""Parameters from which a block is sharded on its own."""


def load_distilled(
    teacher: Teacher,
    plan: Plan,
    library: Library | None,
    device: torch.device,
    step: StepConfig = PLAIN,
) -> Distilled:
    """A student with float32 weights, cut out of the teacher's files, that computes in theirs."""
    weights, family, config = teacher.weights(), teacher.family, teacher.config
    student = Distilled(family, family.build(config, plan, "meta", torch.float32), plan, step)
    if step.compile:
        compile_blocks(student)
    shard(student, device, weights.dtype)
    student.to_empty(device=device)
    fill_student(student.student, plan, StreamedBlocks(family, config, weights), library)
    return student


def load_observed(
    teacher: Teacher, device: torch.device, sharded: bool, step: StepConfig = PLAIN
) -> Observed:
    """The frozen teacher in its files' dtype; whole on every rank when it is not `sharded`."""
    weights, family = teacher.weights(), teacher.family
    empty = family.build(teacher.config, teacher.identity, "meta", weights.dtype)
    observed = Observed(family, empty)
    if step.compile:
        compile_blocks(observed)
    if sharded:
        shard(observed, device, weights.dtype)
    observed.to_empty(device=device)
    fill(observed.teacher, weights)
    return observed


def shard(module: Distilled | Observed, device: torch.device, dtype: torch.dtype) -> None:
    """Spreads a model over all ranks: block by block, then the rest, to which blocks of fewer
    parameters than SMALLEST_UNIT belong.

    Weights keep their own precision; passes run in `dtype`, gradients are averaged in float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Inputs are in `dtype` where they should be; FLUX's rotary tables are float32 and must stay so.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    for block in module.blocks:
        # A collective costs about the same however little it carries: what is small goes together.
        if sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST_UNIT:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
