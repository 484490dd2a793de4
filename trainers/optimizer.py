"""AdamW and its learning rate, as every training here uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainers.distilled import local

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.02
"""Both as PPCL trains."""

_CODES, _SCALE = ".codes", ".scale"


class _AdamW(torch.optim.AdamW):
    """Steps on what this rank holds of each tensor: the same numbers, without the cost of a
    sharded tensor's dispatch, which small tensors feel."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return cast("bool", is_complex)


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float
) -> torch.optim.AdamW:
    """AdamW over many tensors at once, or groups of them with rates of their own; a tensor without
    a gradient is left as it is."""
    return _AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of what this rank holds of some gradients, a float32 scalar."""
    norms = torch._foreach_norm([local(gradient) for gradient in gradients], dtype=torch.float32)
    return torch.stack(norms).square().sum()


def scale(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiplies gradients, in place."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


def make_optimizer(
    kind: Literal["adamw", "adamw8bit"], parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """`adamw8bit` is torchao's, nearly: its moments are quantised, in blocks of 256 values."""
    if kind == "adamw":
        return adamw(parameters, lr)
    from trainers.adamw8bit import AdamW8bit

    made = AdamW8bit(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return cast("torch.optim.Optimizer", made)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # compiled steps read it from there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The share of the highest learning rate at a step: up linearly, then down a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer remembers of a parameter, by kind; sharded as the parameter is.

    A quantised moment is two: its codes, and the scales of their blocks.
    """
    held: dict[str, Tensor] = {}
    for kind, value in optimizer.state.get(parameter, {}).items():
        if type(local(value)) is Tensor:
            held[kind] = value
        else:
            quantised = cast("Any", local(value))
            held[f"{kind}{_CODES}"] = placed(quantised.codes, parameter)
            held[f"{kind}{_SCALE}"] = placed(_scales(quantised), parameter)
    return held


def placed(held: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of a tensor that is sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return held
    shape = torch.Size((len(parameter), *held.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        held, parameter.device_mesh, parameter.placements, shape=shape, stride=stride
    )


def set_moments(
    optimizer: torch.optim.Optimizer, held: Mapping[nn.Parameter, Mapping[str, Tensor]]
) -> None:
    """Gives an optimizer that has not stepped yet what `moments` said, sharded alike. The tensors
    become its own where they can: a copy may not fit beside them.

    Quantised moments are the very same where their blocks are. Ranks of another number may have
    other blocks, or other moments in full: those become what they are here, to 8 bits.
    """
    if any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        # Only a step makes its quantised tensors; at rate 0 it changes nothing else.
        for parameter in held:
            parameter.grad = torch.zeros_like(parameter)
        set_rate(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter, kinds in held.items():
        state = optimizer.state[parameter]
        for kind, value in kinds.items():
            if kind.endswith(_CODES):
                kind = kind.removesuffix(_CODES)
                scales = local(kinds[f"{kind}{_SCALE}"])
                _quantise(local(state[kind]), local(value), scales, signed=kind == "exp_avg")
            elif kind in state:
                local(state[kind]).copy_(local(value))
            elif not kind.endswith(_SCALE):
                state[kind] = value


def _scales(quantised: Any) -> Tensor:
    """The scale of each block of a row, or of each value where blocks do not fill rows: cut by
    rows, as other ranks may have to, it stays right."""
    rows, columns = len(quantised.codes), quantised.codes.numel() // len(quantised.codes)
    if columns % quantised.block_size == 0:
        return cast("Tensor", quantised.scale.view(rows, -1))
    return cast("Tensor", quantised.scale.repeat_interleave(quantised.block_size).view(rows, -1))


def _quantise(into: Any, codes: Tensor, scales: Tensor, signed: bool) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    if not codes.numel():  # more ranks than rows
        return
    each = scales.repeat_interleave(codes.numel() // scales.numel(), dim=-1).reshape(codes.shape)
    if type(into) is not Tensor:
        blocks = each.view(-1, into.block_size)
        if bool((blocks == blocks[:, :1]).all()):
            into.codes.copy_(codes)
            into.scale.copy_(blocks[:, 0])
            return
    # The blocks lie otherwise, or these shards do not allow any.
    qmap = OptimState8bit.zeros((256,), signed, device=codes.device).qmap
    into.copy_(qmap[codes.long()] * each)
