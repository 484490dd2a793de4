"""Trains many replacements in one pass of the teacher a step. Plain torch; Ray is not needed.

A replacement reads the teacher's state before its span and aims at the teacher's state after it
(PPCL's non-sequential depth distillation), so no replacement depends on another: what one becomes
is the same whichever others are trained beside it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.data.latents import Latents, shares, training_inputs
from trainers.library.checkpoints import Checkpoints, History
from trainers.library.config import TrainingConfig
from trainers.losses import span_loss, together, totals
from trainers.optimizer import adamw, rate_at, squared_norm
from trainers.progress import Progress, silent
from trainers.students.families.base import Context, Family, Inputs, MapPair, State
from trainers.students.fits import Maps, fit_maps, map_tokens
from trainers.students.plan import BlockPlan
from trainers.students.surgery import make_block, source_block

SETBACKS = 3
"""Steps of a replacement that may come to nothing."""


@dataclass(frozen=True)
class Trained:
    """What became of one replacement; one cut from the teacher took no steps."""

    block: BlockPlan
    module: nn.Module
    """In the teacher's dtype; meaningless after a failure."""
    losses: tuple[float, ...]
    """One a step; NaN of one that was not taken."""
    failed: str | None = None
    """Why it was dropped, in one sentence."""
    ridged: tuple[str, ...] = ()
    """Linear maps whose system was singular, and so ridged."""
    seconds: float = 0.0
    """Its share of the training time."""
    continued: tuple[int, ...] = ()
    """Steps from which it went on after it was cut off."""


def train_replacements(
    teacher: nn.Module,
    family: Family,
    blocks: Sequence[BlockPlan],
    latents: Latents,
    config: TrainingConfig,
    seed: int,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    micro_batch: int | None = None,
) -> dict[BlockPlan, Trained]:
    """Train a replacement for each of `blocks` against a frozen teacher, on the teacher's device.

    One teacher pass a step serves all of them, at most `micro_batch` pictures at a time. Linear
    maps (projected text, linear FFNs) start from their closed-form fits, and are also held to what
    the teacher does there by their own squared error (PPCL, width distillation). Weights and
    moments are float32; under a teacher of lower precision the passes run in its dtype. A
    replacement whose loss or gradient is not finite stays as it was before that step and goes on at
    half its rate, `SETBACKS` times at most; then it is dropped and says so in its `failed`. The
    others do not notice.

    With `checkpoints` each replacement goes on from its own newest one, exactly; those that have
    come farther join the others at their step. They raise LeavingError when the machine goes.
    """
    progress, started_at = progress or silent(), time.monotonic()
    example = next(teacher.parameters())
    teacher_config = dict(cast("Any", teacher).config)
    teacher_blocks = family.block_modules(teacher)
    started = {block: block.model_copy(update={"start": config.start}) for block in blocks}
    fitted = _fitted(teacher, family, list(started.values()), latents, config, seed, micro_batch)
    modules = {}
    for block in blocks:
        module = make_block(
            family, teacher_config, teacher_blocks, started[block], fits=fitted.fits
        )
        modules[block] = module.float().requires_grad_(True).train()
    optimizer = adamw(
        [{"params": [*module.parameters()]} for module in modules.values()], config.lr
    )
    groups = dict(zip(modules, optimizer.param_groups, strict=True))
    edges = {edge for block in blocks for edge in (block.span[0], block.span[1] + 1)}
    mapped = {block: source_block(started[block]) for block in blocks if family.maps(block)}
    histories = {block: History([]) for block in blocks}
    if checkpoints is not None:
        histories = {b: checkpoints.restore(b, modules[b], optimizer) for b in blocks}
    earlier = {block: history.seconds for block, history in histories.items()}
    failed: dict[BlockPlan, str] = {}
    begin = min(len(history.losses) for history in histories.values())
    progress.update(begin, config.steps)

    batches = latents.batches(seed, config.batch_size, numbers=itertools.count(begin))
    for step, batch in enumerate(islice(batches, config.steps - begin), begin):
        active = [b for b in blocks if b not in failed and len(histories[b].losses) == step]
        if len(failed) == len(blocks):
            break
        if not active:
            continue
        inputs, _ = training_inputs(
            batch.to(example.device, example.dtype), seed, config.timestep_shift
        )
        parts = _parts(inputs, micro_batch)
        passes = [
            teacher_states(teacher, family, part, edges, set(mapped.values())) for part in parts
        ]
        for block in active:
            rate = config.lr * rate_at(step, config.steps, config.warmup)
            groups[block]["lr"] = rate * 0.5 ** _setbacks(histories[block])
        measured = [
            _backward(
                family,
                modules[block],
                block,
                mapped.get(block, 0),
                list(zip(parts, passes, strict=True)),
                config.magnitude,
                text=block.span[1] + 1 < len(teacher_blocks),
            )
            for block in active
        ]
        norms = [squared_norm(_gradients(modules[block])) for block in active]
        # Read once a step: every read makes an accelerator wait.
        found = torch.stack([*measured, *norms]).tolist()
        for i, block in enumerate(active):
            finite = math.isfinite(found[i]) and math.isfinite(found[len(active) + i])
            histories[block].losses.append(found[i] if finite else math.nan)
            if not finite:
                modules[block].zero_grad(set_to_none=True)
                if (times := _setbacks(histories[block])) > SETBACKS:
                    failed[block] = (
                        f"its loss or gradient was not finite at {times} steps, the last {step}; "
                        "lower library.lr"
                    )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        whole = [histories[b] for b in active if math.isfinite(histories[b].losses[-1])]
        share = (time.monotonic() - started_at) / len(blocks)
        for block in active:
            histories[block].seconds = earlier[block] + share
            if checkpoints is not None and block not in failed:
                checkpoints.save(block, modules[block], optimizer, histories[block], config.steps)
        if checkpoints is not None:
            checkpoints.leave(step + 1, config.steps)
        if whole:
            mean = sum(history.losses[-1] for history in whole) / len(whole)
            progress.update(step + 1, config.steps, loss=mean)

    return {
        block: Trained(
            block,
            module.to(example.dtype).requires_grad_(False).eval(),
            tuple(histories[block].losses),
            failed.get(block),
            tuple(
                name
                for name in family.maps(block)
                if (source_block(started[block]), name) in fitted.ridged
            ),
            histories[block].seconds,
            histories[block].continued,
        )
        for block, module in modules.items()
    }


def cut_replacements(
    teacher: nn.Module, family: Family, blocks: Sequence[BlockPlan]
) -> dict[BlockPlan, Trained]:
    """The replacements of `blocks` as `assemble` cuts them from the teacher for any student."""
    config, own = dict(cast("Any", teacher).config), family.block_modules(teacher)
    cut = {block: make_block(family, config, own, block) for block in blocks}
    return {
        block: Trained(block, module.requires_grad_(False).eval(), losses=())
        for block, module in cut.items()
    }


class TeacherPass(NamedTuple):
    """What is read off one pass of the teacher."""

    states: dict[int, State]
    context: Context
    pairs: dict[int, dict[str, MapPair]]


def _setbacks(history: History) -> int:
    """Steps so far that were not taken."""
    return sum(not math.isfinite(loss) for loss in history.losses)


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _parts(inputs: Inputs, micro_batch: int | None) -> list[Inputs]:
    count = len(inputs.noisy_BNC)
    number = math.ceil(count / (micro_batch or count))
    return [inputs.rows(slice(*rows)) for rows in shares(count, number)]


def _backward(
    family: Family,
    module: nn.Module,
    block: BlockPlan,
    source: int,
    parts: Sequence[tuple[Inputs, TeacherPass]],
    magnitude: float,
    text: bool,
) -> Tensor:
    """Adds the gradient of a replacement's loss over a batch that passes in parts; the loss.

    Its linear maps learn from the teacher block `source`."""
    first, last = block.span
    aims = [(seen.states[last + 1], inputs.mask_BM) for inputs, seen in parts]
    text_whole = together([totals(aim.text_BMD, mask_BM) for aim, mask_BM in aims])
    image_whole = together([totals(aim.image_BND) for aim, _ in aims])
    total = text_whole.tokens.new_zeros(())
    for (inputs, seen), (aim, mask_BM) in zip(parts, aims, strict=True):
        device, dtype = inputs.noisy_BNC.device.type, inputs.noisy_BNC.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            after = family.run_block(module, seen.states[first], seen.context)
        loss = span_loss(after, aim, mask_BM, magnitude, text, (text_whole, image_whole))
        for name in family.maps(block):
            pair = seen.pairs[source][name]
            read_TD, added_TD = map_tokens(pair, mask_BM)
            error = F.mse_loss(module.get_submodule(name)(read_TD), added_TD)
            loss = loss + error * (len(read_TD) / (text_whole if pair.text else image_whole).tokens)
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def teacher_states(
    teacher: nn.Module,
    family: Family,
    inputs: Inputs,
    edges: Collection[int],
    mapped: Collection[int] = (),
) -> TeacherPass:
    """The teacher's states before each block in `edges` (L is after the last), in one pass, and
    what linear maps should learn from each block in `mapped`.

    The pass ends at the highest edge.
    """
    state, context = family.begin(teacher, inputs)
    states = {0: state} if 0 in edges else {}
    pairs = {}
    for i, block in enumerate(islice(family.block_modules(teacher), max(edges))):
        if i in mapped:
            state, pairs[i] = family.map_pairs(block, state, context)
        else:
            state = family.run_block(block, state, context)
        if i + 1 in edges:
            states[i + 1] = state
    return TeacherPass(states, context, pairs)


def _fitted(
    teacher: nn.Module,
    family: Family,
    blocks: Sequence[BlockPlan],
    latents: Latents,
    config: TrainingConfig,
    seed: int,
    micro_batch: int | None,
) -> Maps:
    example = next(teacher.parameters())
    wanted: dict[int, set[str]] = {}
    for block in blocks:
        first, last = block.span
        average = block.start == "average"
        for i in range(first, last + 1) if average else [source_block(block)]:
            wanted.setdefault(i, set()).update(family.maps(block))
    batches = islice(latents.batches(seed, config.batch_size), config.fit_batches)
    inputs = (
        part
        for batch in batches
        for part in _parts(
            training_inputs(batch.to(example.device, example.dtype), seed, config.timestep_shift)[
                0
            ],
            micro_batch,
        )
    )
    return fit_maps(teacher, family, inputs, wanted)
