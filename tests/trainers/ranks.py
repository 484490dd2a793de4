"""Runs a function on several ranks: real processes in one gloo group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, of a module and JSON-able, gives on each of `world` ranks."""
    torch.multiprocessing.spawn(_rank, (world, function, folder, arguments), nprocs=world)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rank(
    rank: int, world: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=world
    )
    (folder / f"rank-{rank}.json").write_text(json.dumps(function(*arguments)))
    torch.distributed.destroy_process_group()
