"""Trains many replacements in one pass of the teacher a step. Plain torch; Ray is not needed.

A replacement reads the teacher's state before its span and aims at the teacher's state after it
(PPCL's non-sequential depth distillation), so no replacement depends on another: what one becomes
is the same whichever others are trained beside it.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.data.latents import LatentBatch, Latents, shares, training_inputs
from trainers.library.checkpoints import Checkpoints, History
from trainers.library.config import TrainingConfig
from trainers.losses import span_loss, together, totals
from trainers.optimizer import adamw, rate_at, squared_norm
from trainers.progress import Progress, silent
from trainers.spikes import RECENT, is_spike
from trainers.students.families.base import Context, Family, Inputs, MapPair, State
from trainers.students.fits import Maps, fit_maps, map_tokens
from trainers.students.plan import BlockPlan
from trainers.students.surgery import make_block, source_block

_log = logging.getLogger(__name__)

SETBACKS = 3
"""How often a replacement's rate may be halved: after a step that came to nothing, or a spike."""
SPIKE = 10.0
"""A loss so many times the median of the steps before it is a spike. Replacements of the miniature
never came to more than 1.9 times."""


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
    setbacks: int = 0
    """How often its rate was halved."""


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
    moments are float32; under a teacher of lower precision the passes run in its dtype.

    A replacement whose loss or gradient is not finite stays as it was before that step and goes on
    at half its rate; one whose loss is a spike goes back to its newest checkpoint first, to its
    start where it has none, and trains again from there when the others are through. After
    `SETBACKS` of both spikes pass, and what is not finite drops it, as its `failed` says. The
    others do not notice.

    With `checkpoints` each replacement goes on from its own newest one, exactly; those that have
    come farther join the others at their step. They raise LeavingError when the machine goes.
    """
    group = _Group(teacher, family, blocks, latents, config, seed, checkpoints, micro_batch)
    progress = progress or silent()
    while left := group.left():
        begin = min(left.values())
        progress.update(begin, config.steps)
        batches = latents.batches(seed, config.batch_size, numbers=itertools.count(begin))
        for step, batch in enumerate(islice(batches, config.steps - begin), begin):
            if all(at < step for at in group.left().values()):
                break  # what is left has gone back
            losses = group.step(step, batch)
            if checkpoints is not None:
                checkpoints.leave(step + 1, config.steps)
            if losses:
                mean = sum(losses) / len(losses)
                progress.update(step + 1, config.steps, loss=mean)
    return group.trained()


class _Group:
    """Replacements in training beside each other, each at a step of its own."""

    def __init__(
        self,
        teacher: nn.Module,
        family: Family,
        blocks: Sequence[BlockPlan],
        latents: Latents,
        config: TrainingConfig,
        seed: int,
        checkpoints: Checkpoints | None,
        micro_batch: int | None,
    ) -> None:
        self._teacher, self._family = teacher, family
        self._config, self._seed = config, seed
        self._checkpoints, self._micro_batch = checkpoints, micro_batch
        self._started_at = time.monotonic()
        self._example = next(teacher.parameters())
        self._teacher_config = dict(cast("Any", teacher).config)
        self._teacher_blocks = family.block_modules(teacher)
        self._started = {b: b.model_copy(update={"start": config.start}) for b in blocks}
        cut = list(self._started.values())
        self._fitted = _fitted(teacher, family, cut, latents, config, seed, micro_batch)
        self._modules = {block: self._begun(block) for block in blocks}
        self._optimizer = adamw(
            [{"params": [*module.parameters()]} for module in self._modules.values()], config.lr
        )
        self._settings = dict(zip(self._modules, self._optimizer.param_groups, strict=True))
        self._mapped = {b: source_block(self._started[b]) for b in blocks if family.maps(b)}
        self._histories = {block: History([]) for block in blocks}
        if checkpoints is not None:
            for block, module in self._modules.items():
                self._histories[block] = checkpoints.restore(block, module, self._optimizer)
        self._earlier = {block: history.seconds for block, history in self._histories.items()}
        self._failed: dict[BlockPlan, str] = {}

    def left(self) -> dict[BlockPlan, int]:
        """The next step of each that is not at its end."""
        at = {block: len(self._histories[block].losses) for block in self._modules}
        return {
            block: step
            for block, step in at.items()
            if step < self._config.steps and block not in self._failed
        }

    def step(self, step: int, batch: LatentBatch) -> list[float]:
        """Step number `step` of those that are there; the losses of those that took it."""
        active = [block for block, at in self.left().items() if at == step]
        if not active:
            return []
        for block in active:
            rate = self._config.lr * rate_at(step, self._config.steps, self._config.warmup)
            self._settings[block]["lr"] = rate * 0.5 ** self._histories[block].setbacks
        taken, spiked = {}, []
        for block, loss, norm in self._backward(active, batch):
            history = self._histories[block]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._modules[block].zero_grad(set_to_none=True)
                self._set_back(block, step)
                loss = math.nan
            elif history.setbacks < SETBACKS and is_spike(loss, history.losses, SPIKE):
                self._modules[block].zero_grad(set_to_none=True)
                spiked.append(block)
            else:
                taken[block] = loss
            history.losses.append(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for block in spiked:
            self._go_back(block)
        share = (time.monotonic() - self._started_at) / len(self._modules)
        for block in active:
            self._histories[block].seconds = self._earlier[block] + share
            if self._checkpoints is None or block in self._failed or block in spiked:
                continue
            self._checkpoints.save(
                block,
                self._modules[block],
                self._optimizer,
                self._histories[block],
                self._config.steps,
            )
        return list(taken.values())

    def trained(self) -> dict[BlockPlan, Trained]:
        """What became of them."""
        return {
            block: Trained(
                block,
                module.to(self._example.dtype).requires_grad_(False).eval(),
                tuple(self._histories[block].losses),
                self._failed.get(block),
                tuple(
                    name
                    for name in self._family.maps(block)
                    if (source_block(self._started[block]), name) in self._fitted.ridged
                ),
                self._histories[block].seconds,
                self._histories[block].continued,
                self._histories[block].setbacks,
            )
            for block, module in self._modules.items()
        }

    def _begun(self, block: BlockPlan) -> nn.Module:
        module = make_block(
            self._family,
            self._teacher_config,
            self._teacher_blocks,
            self._started[block],
            fits=self._fitted.fits,
        )
        return module.float().requires_grad_(True).train()

    def _backward(
        self, active: Sequence[BlockPlan], batch: LatentBatch
    ) -> list[tuple[BlockPlan, float, float]]:
        """Adds the gradients of one batch; each replacement's loss and its gradient's squared
        norm."""
        inputs, _ = training_inputs(
            batch.to(self._example.device, self._example.dtype),
            self._seed,
            self._config.timestep_shift,
        )
        edges = {edge for block in active for edge in (block.span[0], block.span[1] + 1)}
        mapped = {self._mapped[block] for block in active if block in self._mapped}
        parts = [
            (part, teacher_states(self._teacher, self._family, part, edges, mapped))
            for part in _parts(inputs, self._micro_batch)
        ]
        losses = [
            _backward(
                self._family,
                self._modules[block],
                block,
                self._mapped.get(block, 0),
                parts,
                self._config.magnitude,
                text=block.span[1] + 1 < len(self._teacher_blocks),
            )
            for block in active
        ]
        norms = [squared_norm(_gradients(self._modules[block])) for block in active]
        # Read once a step: every read makes an accelerator wait.
        found = torch.stack([*losses, *norms]).tolist()
        return list(zip(active, found[: len(active)], found[len(active) :], strict=True))

    def _set_back(self, block: BlockPlan, step: int) -> None:
        """Halves its rate, or drops it."""
        history = self._histories[block]
        if history.setbacks == SETBACKS:
            self._failed[block] = (
                f"its loss or gradient was not finite at step {step}, after its rate had been "
                f"halved {SETBACKS} times; lower library.lr"
            )
        else:
            history.setbacks += 1

    def _go_back(self, block: BlockPlan) -> None:
        """From a spike to its newest checkpoint, or its start, and on at half the rate."""
        module, gone = self._modules[block], self._histories[block]
        found = None
        if self._checkpoints is not None:
            found = self._checkpoints.go_back(block, module, self._optimizer)
        if found is None:
            module.load_state_dict(self._begun(block).state_dict())
            for parameter in module.parameters():
                self._optimizer.state.pop(parameter, None)
            found = History([], continued=gone.continued)
        found.setbacks = gone.setbacks + 1
        self._histories[block] = found
        _log.warning(
            "%s: step %d: the loss rose to %.3g, over %g times the median of the %d steps before "
            "it; going back to step %d and on at half the rate",
            block, len(gone.losses) - 1, gone.losses[-1], SPIKE, RECENT, len(found.losses),
        )  # fmt: skip


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
