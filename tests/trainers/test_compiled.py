"""Compiled blocks: that they stay so, whatever phases and batches they meet."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from trainers.distilled import compile_blocks


class Little(nn.Module):
    """A block that torch compiles in no time, and anew for what it compiles Qwen-Image's anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, text_BMD: Tensor, mask_BM: Tensor | None) -> Tensor:
        if mask_BM is not None:
            text_BMD = text_BMD * mask_BM[..., None]
        return text_BMD * self.weight


def test_blocks_stay_compiled_whatever_they_are_given() -> None:
    blocks = SimpleNamespace(blocks=[Little(), Little()])
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(cast("Any", blocks), backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        either = (False, True)
        for learns, follows, masked, tokens in product(either, either, either, (3, 4, 5)):
            text_BMD = torch.ones(2, tokens, 4, requires_grad=follows)
            mask_BM = torch.ones(2, tokens) if masked else None
            with torch.set_grad_enabled(learns):
                for block in blocks.blocks:
                    block(text_BMD, mask_BM)
    assert counters["stats"]["unique_graphs"] > 8  # which is torch's own limit
