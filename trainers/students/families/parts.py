"""What the dual-stream blocks of the families have in common: their sizes, FFNs and text maps.

diffusers builds them from the same layers under other names. Torch and diffusers are imported when
they are needed. Shapes: B batch, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from trainers.students.families.base import MapPair, State, Work
from trainers.students.plan import BlockPlan, Text

if TYPE_CHECKING:
    import torch
    from diffusers.models.attention import FeedForward
    from torch import Tensor, nn

FFN_MULTIPLE = 4
"""Hidden channels of a stock block's FFN per channel of width; fixed in diffusers."""

TIMESTEP_CHANNELS = 256
"""Sinusoidal channels that the timestep embedding reads; fixed in diffusers."""


class BlockShape(NamedTuple):
    """What a student block is made of, apart from the width."""

    ffn: int | None
    """Hidden channels of each FFN; None for a linear map in its place."""
    text: Text
    text_map: bool

    @classmethod
    def of(cls, width: int, block: BlockPlan) -> BlockShape:
        ffn = None if block.ffn == "linear" else ffn_width(width, block.ffn)
        return cls(ffn, block.text, block.text_map)

    @property
    def stock(self) -> bool:
        """Whether the stock class holds it, with other FFNs at most."""
        return self.ffn is not None and self.text == "dual"


def ffn_width(width: int, fraction: float) -> int:
    """Hidden channels of an FFN of which `fraction` is kept; at least 1."""
    return max(1, round(fraction * FFN_MULTIPLE * width))


def linear_parameters(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def dual_block_parameters(width: int, head_dim: int, shape: BlockShape) -> int:
    """Parameters of a dual-stream block, or of what is left of one."""
    d, linear = width, linear_parameters
    attention = 4 * linear(d, d) + 2 * head_dim
    if shape.ffn is None:
        branch = linear(d, 3 * d) + linear(d, d)
    else:
        branch = linear(d, 6 * d) + linear(d, shape.ffn) + linear(shape.ffn, d)
    match shape.text:
        case "dual":
            return 2 * (attention + branch)
        case "projected":  # the text's attention layers stay, its output's unread (as PPCL's)
            return 2 * attention + branch + (1 + shape.text_map) * linear(d, d)
        case "shared":
            return attention + branch


# What autograd keeps of a block for a token, in bytes a channel of width, or of an FFN's hidden
# channels, with states of two bytes. Counted, and held against tensors by tests/trainers.
_KEPT = 41
_KEPT_LINEAR_FFN = 35
_KEPT_PROJECTED = 28
KEPT_SINGLE = 33.5
KEPT_HIDDEN = 4


def dual_block_work(width: int, shape: BlockShape) -> Work:
    """What a dual-stream block costs, or what is left of one."""
    hidden = shape.ffn or 0
    weights = 4 * width**2 + (width**2 if shape.ffn is None else 2 * width * hidden)
    kept = (_KEPT_LINEAR_FFN if shape.ffn is None else _KEPT) * width + KEPT_HIDDEN * hidden
    if shape.text != "projected":
        return Work(weights, weights, kept, kept)
    # The map, queries, keys and values; nothing reads what the text attends to.
    return Work(weights, (4 + shape.text_map) * width**2, kept, _KEPT_PROJECTED * width)


class DualNames(NamedTuple):
    """What a family calls the parts of a dual-stream block that a student's may lack."""

    image_mod: str
    """The linear layer that modulates the image: attention's half, then the FFN's."""
    text_mod: str
    image_ffn: str
    text_ffn: str

    def kept(self, block: BlockPlan, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A dual block's weights without what the student block does not have."""
        tensors = dict(whole)
        if block.ffn == "linear":
            ffns = (f"{self.image_ffn}.", f"{self.text_ffn}.")
            tensors = {k: t for k, t in tensors.items() if not k.startswith(ffns)}
            for mod in (self.image_mod, self.text_mod):
                for kind in ("weight", "bias"):
                    tensors[f"{mod}.{kind}"] = tensors[f"{mod}.{kind}"].chunk(2)[0]
        if block.text != "dual":
            text = (f"{self.text_mod}.", f"{self.text_ffn}.")
            tensors = {k: t for k, t in tensors.items() if not k.startswith(text)}
        if block.text == "shared":
            tensors = {k: t for k, t in tensors.items() if ".add_" not in k and "_add" not in k}
        return tensors

    def maps(self, block: BlockPlan) -> tuple[str, ...]:
        """The linear maps of a student block: see Family.maps."""
        ffns = (self.image_ffn, *([self.text_ffn] if block.text == "dual" else []))
        return (
            *(ffns if block.ffn == "linear" else ()),
            *(["txt_proj"] if block.text == "projected" else []),
            *(["txt_map"] if block.text_map else []),
        )

    def map_pairs(
        self, before: State, after: State, image_BND: Tensor, text_BMD: Tensor
    ) -> dict[str, MapPair]:
        """What each map should learn from a block, of whose states after attention image and text
        are given."""
        pairs = {
            self.image_ffn: MapPair(image_BND, after.image_BND - image_BND, text=False),
            self.text_ffn: MapPair(text_BMD, after.text_BMD - text_BMD, text=True),
            "txt_map": MapPair(before.text_BMD, after.text_BMD - before.text_BMD, text=True),
        }
        if before.modulated_BMD is not None and after.modulated_BMD is not None:
            change_BMD = after.modulated_BMD - before.modulated_BMD
            pairs["txt_proj"] = MapPair(before.modulated_BMD, change_BMD, text=True)
        return pairs

    def ffns(self, block: nn.Module) -> dict[str, nn.Module]:
        return {
            "image": block.get_submodule(self.image_ffn),
            "text": block.get_submodule(self.text_ffn),
        }

    def ffn_tensors(self, name: str, ffn: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        """The weights of an FFN on the hidden channels `kept`, by name in the block."""
        read, write = _layers(ffn)
        prefix = f"{self.image_ffn if name == 'image' else self.text_ffn}.net"
        return {
            f"{prefix}.0.proj.weight": read.weight[kept],
            f"{prefix}.0.proj.bias": read.bias[kept],
            f"{prefix}.2.weight": write.weight[:, kept],
            f"{prefix}.2.bias": write.bias,
        }


def ffn_importance(ffn: nn.Module) -> Tensor:
    """The product of the norms of each hidden channel's in- and outgoing weights, [hidden]."""
    read, write = _layers(ffn)
    return read.weight.float().norm(dim=1) * write.weight.float().norm(dim=0)


def narrow_ffn(width: int, hidden: int) -> nn.Module:
    """An FFN with uninitialised weights and `hidden` channels, named as the stock one."""
    from diffusers.models.attention import FeedForward

    built = FeedForward(
        dim=width, dim_out=width, inner_dim=hidden, activation_fn="gelu-approximate"
    )
    return cast("nn.Module", built)


def ffn_or_map(width: int, hidden: int | None) -> nn.Module:
    """An FFN, or the linear map in its place when `hidden` is None."""
    from torch import nn

    return nn.Linear(width, width) if hidden is None else narrow_ffn(width, hidden)


@contextlib.contextmanager
def read_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the first argument that a module is called with.

    A hook, because a sharded block has its weights only inside its own `forward`.
    """
    read: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        read.append(arguments[0])

    handle = module.register_forward_pre_hook(note)
    try:
        yield read
    finally:
        handle.remove()


class _Note:
    """What a module was last called with."""

    value: Tensor | None = None


def call_reading(
    block: nn.Module, module: nn.Module, keyword: str, arguments: Mapping[str, Any]
) -> tuple[Any, Tensor]:
    """What a block gives, and what `module` in it was called with by `keyword`.

    Its hook stays there: a compiled block knows those that it had when it was compiled.
    """
    note = module.__dict__.get("_espalier_note")
    if note is None:
        note = module.__dict__["_espalier_note"] = _Note()

        def keep(called: Any, _: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            called._espalier_note.value = keywords[keyword]

        module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        result = block(**arguments)
        assert note.value is not None, keyword
        return result, note.value
    finally:
        note.value = None


def materialise(
    module: nn.Module, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    """A module from the meta device, uninitialised on `device`."""
    import torch

    if dtype is not None:
        module = module.to(dtype)
    return module if torch.device(device).type == "meta" else module.to_empty(device=device)


def _layers(ffn: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The layer into the hidden channels and the one out of them."""
    net = cast("FeedForward", ffn).net
    return cast("nn.Linear", net[0].proj), cast("nn.Linear", net[2])
