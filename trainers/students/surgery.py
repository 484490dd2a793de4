"""Cuts a student out of a teacher: merges spans into blocks, narrows FFNs, assembles the whole.

Every weight is a copy in the dtype and on the device of the teacher's, free to train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from storage.errors import EspalierError
from trainers.students.families import family_named
from trainers.students.families.base import Config, Family
from trainers.students.plan import BlockPlan, Plan

Library = Callable[[BlockPlan], Mapping[str, Tensor]]
"""The trained weights of a replacement, named as in its block."""


class SurgeryError(EspalierError):
    """A plan that cannot be cut out of this teacher with what is at hand."""


@torch.no_grad()
def make_block(
    family: Family,
    config: Config,
    teacher_blocks: Sequence[nn.Module] | nn.ModuleList,
    block: BlockPlan,
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """One student block from the span's weights; `start` says how, and never `library` here.

    `teacher_blocks` is the whole teacher's. `average` is the plain mean of the span's weights
    (Amber's local averaging), taken in float32. Below full width the hidden channels of highest
    importance stay, each with its bias and both its weights; `importance` gives it for each FFN by
    name, [hidden] each, else the product of the norms of a channel's in- and outgoing weights.
    """
    first, last = block.span
    if last >= len(teacher_blocks) or not 0 <= first <= last:
        raise SurgeryError(
            f"span [{first}, {last}] is not within the teacher's blocks 0 to "
            f"{len(teacher_blocks) - 1}"
        )
    span = [teacher_blocks[i] for i in range(first, last + 1)]
    match block.start:
        case "first":
            source = span[0].state_dict()
        case "middle":
            source = span[(len(span) - 1) // 2].state_dict()
        case "average":
            source = _average([module.state_dict() for module in span])
        case "library":
            raise SurgeryError(
                f"block [{first}, {last}] starts from the library; pass a library to assemble, or "
                "give the start that its training began with"
            )
    if block.ffn < 1.0:
        # The full-width block first: an average has channels that no teacher block has.
        whole = family.build_block(config, block.model_copy(update={"ffn": 1.0}), "meta")
        whole.load_state_dict(source, assign=True)
        width = family.ffn_width(config, block.ffn)
        for name, ffn in family.ffns(whole).items():
            weight = importance[name] if importance else family.ffn_importance(ffn)
            source = source | family.ffn_tensors(name, ffn, _highest(weight, width))
    return _filled(family.build_block(config, block, "meta"), _copies(source))


@torch.no_grad()
def assemble(teacher: nn.Module, plan: Plan, library: Library | None = None) -> nn.Module:
    """The student of a plan, with its own copies of all weights.

    Blocks that start from the library take their weights from `library(block)`; SurgeryError
    names the block when they are missing or of another shape. The outside of the blocks is the
    teacher's.
    """
    family = family_named(plan.family)
    config: Config = dict(cast("Any", teacher).config)
    teacher_blocks = family.block_modules(teacher)
    if len(teacher_blocks) != plan.teacher_blocks:
        raise SurgeryError(
            f"the plan is for a teacher of {plan.teacher_blocks} blocks, this one has "
            f"{len(teacher_blocks)}; give the teacher that the plan was made for"
        )
    prefix = family.block_prefix()
    outside = {k: v for k, v in teacher.state_dict().items() if not k.startswith(prefix)}
    tensors = _copies(outside)
    for i, block in enumerate(plan.blocks):
        if block.start == "library":
            made = _from_library(family, config, teacher_blocks[0], block, library)
        else:
            made = make_block(family, config, teacher_blocks, block).state_dict()
        tensors |= {f"{prefix}{i}.{name}": tensor for name, tensor in made.items()}
    return _filled(family.build(config, plan, "meta"), tensors)


def _from_library(
    family: Family,
    config: Config,
    like: nn.Module,
    block: BlockPlan,
    library: Library | None,
) -> dict[str, Tensor]:
    name = f"block [{block.span[0]}, {block.span[1]}] (ffn {block.ffn:g})"
    if library is None:
        raise SurgeryError(f"{name} starts from the library, and no library was given")
    weights = library(block)
    wanted = family.build_block(config, block, "meta").state_dict()
    for key, tensor in wanted.items():
        if key not in weights or weights[key].shape != tensor.shape:
            found = list(weights[key].shape) if key in weights else "nothing"
            raise SurgeryError(
                f"{name}: the library has {found} for {key}, and {list(tensor.shape)} is needed; "
                "train this replacement again"
            )
    example = next(like.parameters())
    return {
        key: weights[key].detach().to(example.device, example.dtype, copy=True) for key in wanted
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The meta module on these very tensors, all of which it must use: nothing is copied."""
    module.load_state_dict(tensors, assign=True)
    return module


def _average(span: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    averaged = {}
    for name, tensor in span[0].items():
        total = tensor.float()
        for other in span[1:]:
            total = total + other[name].float()
        averaged[name] = (total / len(span)).to(tensor.dtype)
    return averaged


def _highest(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, ascending; of equal ones the first."""
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:count].sort().values
