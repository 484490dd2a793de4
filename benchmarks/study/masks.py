"""Learnable depth masks in the way of TinyFusion: which blocks stay is trained together with
low-rank updates that stand for the fine-tuning to come.

Blocks are taken in groups; of each group a fixed number stays, one of its combinations, drawn by a
straight-through Gumbel softmax. The updates are thrown away, the likeliest combinations kept.
"""

from __future__ import annotations

import copy
import itertools
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from search.rules import uniform
from trainers.data.latents import training_inputs
from trainers.losses import velocity_loss
from trainers.students.families.base import State
from trainers.students.plan import Plan

if TYPE_CHECKING:
    from benchmarks.study.methods import Case

GROUP = 4
"""Blocks of a group (TinyFusion's M)."""
RANK = 4
STEPS, BATCH, RATE = 80, 24, 2e-2


class _LowRank(nn.Module):
    """W + B A, with B at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def masked_plan(case: Case) -> Plan | None:
    """The plan that keeps the blocks of the learned mask; dropped ones join the kept one before."""
    even = uniform(case.ground, case.limit)
    if even is None:
        return None
    kept = learn_mask(case, len(even.blocks))
    ends = [*(i - 1 for i in kept[1:]), case.ground.teacher_blocks - 1]
    # A plan's first span starts at the first block, also when the mask would drop that.
    starts = [0, *kept[1:]]
    return case.ground.plan([(a, b) for a, b in zip(starts, ends, strict=True) if b > a])


def learn_mask(case: Case, count: int) -> list[int]:
    """`count` blocks to keep, ascending."""
    setting, family = case.setting, case.setting.family
    torch.manual_seed(case.seed)
    model = copy.deepcopy(setting.teacher).requires_grad_(False)
    blocks = family.block_modules(model)
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", _LowRank(module.weight))
    groups = [list(range(i, min(i + GROUP, len(blocks)))) for i in range(0, len(blocks), GROUP)]
    stay = [round(count * group[-1] + count) // len(blocks) for group in groups]
    stay = [now - before for before, now in itertools.pairwise([0, *stay])]
    choices = [list(itertools.combinations(g, n)) for g, n in zip(groups, stay, strict=True)]
    logits = nn.ParameterList([nn.Parameter(torch.zeros(len(c))) for c in choices])
    masks = []
    for group, combinations in zip(groups, choices, strict=True):
        masks.append(torch.tensor([[float(i in c) for i in group] for c in combinations]))
    updates = [p for p in blocks.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": updates, "lr": 1e-3}, {"params": list(logits), "lr": RATE * 5}]
    )
    config = setting.sweep.config.library
    batches = setting.latents.batches(case.seed, BATCH)
    for batch in islice(batches, STEPS):
        inputs, _ = training_inputs(batch, case.seed, config.timestep_shift)
        drawn = [F.gumbel_softmax(logit, tau=1.0, hard=True) for logit in logits]
        gates = torch.cat([one @ mask for one, mask in zip(drawn, masks, strict=True)])
        state, context = family.begin(model, inputs)
        for gate, block in zip(gates, blocks, strict=True):
            after = family.run_block(block, state, context)
            state = State(
                torch.lerp(state.text_BMD, after.text_BMD, gate),
                torch.lerp(state.image_BND, after.image_BND, gate),
            )
        with torch.no_grad():
            target_BNC = family.forward(setting.teacher, inputs)
        loss = velocity_loss(family.end(model, state, context), target_BNC)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sorted(
        i
        for combinations, logit in zip(choices, logits, strict=True)
        for i in combinations[int(logit.argmax())]
    )
