"""What the tests of training share: latents without an encoder, a loaded teacher, a local Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from trainers.data.latents import Latents, Shard


def small_latents(pictures: int = 20, held_out: int = 4, shard: int = 8) -> Latents:
    """Random latents of the tiny pipeline's sizes, captions of 3 to 6 tokens, in shards."""
    generator = torch.Generator().manual_seed(7)
    shards = []
    for start in range(0, pictures, shard):
        n = min(shard, pictures - start)
        lengths = torch.randint(3, 7, (n, 1), generator=generator)
        shards.append(
            Shard(
                latents=torch.randn(n, 16, 8, 8, generator=generator),
                embeds=torch.randn(n, 6, 64, generator=generator),
                mask=torch.arange(6) < lengths,
                captions=tuple(f"picture {start + i}" for i in range(n)),
            )
        )
    return Latents(shards, held_out)


def load_transformer(pipeline: Path) -> nn.Module:
    """The tiny pipeline's transformer, frozen."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    return model.requires_grad_(False).eval()


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray cluster of this machine, unless one is running already."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        yield
    finally:
        ray.shutdown()
