"""torchao's AdamW in 8 bits, which quantises a moment on all ranks or on none.

torchao looks at each rank's own shard: too small, or not a whole number of blocks, and it stays in
full. Where rows do not divide evenly some ranks would then hold codes and the others values, and no
name in a checkpoint would cover the whole moment.
"""

from __future__ import annotations

import torch
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor


class AdamW8bit(torchao.optim.AdamW8bit):
    """Quantises a moment when every shard of its parameter, which is sharded by rows, allows it."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if isinstance(p, DTensor):
            shards = torch.empty(p.shape, device="meta").chunk(p.device_mesh.size())
            for shard in (shards[0], shards[-1]):  # all but the last are alike; none is empty
                if type(super()._new_buffer(shard, signed)) is Tensor:
                    return torch.zeros_like(p)
        return super()._new_buffer(p, signed)
