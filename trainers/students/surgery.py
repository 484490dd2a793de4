"""Cuts a student out of a teacher: merges spans into blocks, narrows FFNs, assembles the whole.

Every weight is a copy in the dtype and on the device of the teacher's, free to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from storage.errors import EspalierError
from trainers.students.families import family_named
from trainers.students.families.base import Config, Family, check_plan
from trainers.students.plan import BlockPlan, Plan, identity_plan

Fits = Mapping[int, Mapping[str, Tensor]]
"""Linear maps fitted to each teacher block, named as in a student block: trainers/students/fits."""

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
    fits: Fits | None = None,
) -> nn.Module:
    """One student block from the span's weights; `start` says how, and never `library` here.

    `teacher_blocks` is the whole teacher's. `average` is the plain mean of the span's weights
    (Amber's local averaging), taken in float32. Below full width the hidden channels of highest
    importance stay, each with its bias and both its weights; `importance` gives it for each FFN by
    name, [hidden] each, else the product of the norms of a channel's in- and outgoing weights.
    Linear maps that no teacher block has start from `fits` (PPCL's closed form), of the block that
    the other weights come from, or averaged as they are; without fits they start at zero.
    """
    first, last = block.span
    if last >= len(teacher_blocks) or not 0 <= first <= last:
        raise SurgeryError(
            f"span [{first}, {last}] is not within the teacher's blocks 0 to "
            f"{len(teacher_blocks) - 1}"
        )
    if block.start == "library":
        raise SurgeryError(
            f"block of {block}: it starts from the library; pass a library to assemble, or give "
            "the start that its training began with"
        )
    sources = list(range(first, last + 1)) if block.start == "average" else [source_block(block)]
    source = _average([teacher_blocks[i].state_dict() for i in sources])
    if block.ffn != "linear" and block.ffn < 1.0:
        # The full-width block first: an average has channels that no teacher block has.
        whole = family.build_block(config, BlockPlan(span=block.span), "meta")
        whole.load_state_dict(source, assign=True)
        width = family.ffn_width(config, block.ffn)
        for name, ffn in family.ffns(whole).items():
            weight = importance[name] if importance else family.ffn_importance(ffn)
            source = source | family.ffn_tensors(name, ffn, _highest(weight, width))
    source = family.block_tensors(block, source)
    built = family.build_block(config, block, "meta")
    if family.maps(block):
        source |= _fitted(family.maps(block), built, source, [(fits or {}).get(i) for i in sources])
    return _filled(built, _copies(source))


def source_block(block: BlockPlan) -> int:
    """The teacher block that a student block's weights start from, or the middle one of several."""
    first, last = block.span
    return first if block.start == "first" else (first + last) // 2


@torch.no_grad()
def assemble(
    teacher: nn.Module, plan: Plan, library: Library | None = None, fits: Fits | None = None
) -> nn.Module:
    """The student of a plan, with its own copies of all weights.

    Blocks that start from the library take their weights from `library(block)`; SurgeryError
    names the block when they are missing or of another shape; the linear maps of others start from
    `fits`. The outside of the blocks is the teacher's. PlanError when the plan is not for this
    teacher.
    """
    family = family_named(plan.family)
    config: Config = dict(cast("Any", teacher).config)
    check_plan(family, config, plan)
    inside = family.block_prefixes(config, identity_plan(plan.family, plan.teacher_blocks))
    outside = {k: v for k, v in teacher.state_dict().items() if not k.startswith(inside)}
    tensors = _copies(outside)
    blocks, like = family.block_modules(teacher), next(teacher.parameters())
    for made in cut_blocks(family, config, blocks, plan, like, library, fits):
        tensors |= made
    return _filled(family.build(config, plan, "meta"), tensors)


@torch.no_grad()
def cut_blocks(
    family: Family,
    config: Config,
    teacher_blocks: Sequence[nn.Module] | nn.ModuleList,
    plan: Plan,
    like: Tensor,
    library: Library | None = None,
    fits: Fits | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The weights of a student's blocks one by one, named as in the student; see `assemble`.

    Of the teacher's blocks only those of one span are asked for at a time; `like` has their dtype
    and device.
    """
    for prefix, block in zip(family.block_prefixes(config, plan), plan.blocks, strict=True):
        if block.start == "library":
            made = _from_library(family, config, block, like, library)
        else:
            made = make_block(family, config, teacher_blocks, block, fits=fits).state_dict()
        yield {f"{prefix}{name}": tensor for name, tensor in made.items()}


def _from_library(
    family: Family,
    config: Config,
    block: BlockPlan,
    like: Tensor,
    library: Library | None,
) -> dict[str, Tensor]:
    name = f"block of {block}"
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
    return {key: weights[key].detach().to(like.device, like.dtype, copy=True) for key in wanted}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The meta module on these very tensors, all of which it must use: nothing is copied."""
    module.load_state_dict(tensors, assign=True)
    return module


def _fitted(
    maps: Sequence[str],
    built: nn.Module,
    like: Mapping[str, Tensor],
    fits: Sequence[Mapping[str, Tensor] | None],
) -> dict[str, Tensor]:
    """The weights of the maps of a block, which is on the meta device; zeros without fits."""
    example = next(iter(like.values()))
    names = [f"{name}.{kind}" for name in maps for kind in ("weight", "bias")]
    known = [fit for fit in fits if fit is not None]
    if len(known) == len(fits):
        found = _average([{name: fit[name] for name in names} for fit in known])
        return {name: tensor.to(example) for name, tensor in found.items()}
    wanted = built.state_dict()
    return {name: torch.zeros(wanted[name].shape).to(example) for name in names}


def _average(span: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(span) == 1:
        return dict(span[0])
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
