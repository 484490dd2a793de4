"""What the tests of training share: latents without an encoder, a loaded teacher, a local Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from trainers.data.latents import LatentBatch, Latents, Shard
from trainers.students.families.base import Inputs
from trainers.students.fits import MapSums

WithText = TypeVar("WithText", Inputs, LatentBatch)


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


def padded(batch: WithText, columns: int = 3) -> WithText:
    """The same batch with so many more columns of padding, in which there may be anything."""
    embeds, mask = batch.embeds_BMD, batch.mask_BM
    texts, length, width = embeds.shape
    anything = torch.randn(texts, columns, width, generator=torch.Generator().manual_seed(5))
    real = torch.ones(texts, length, dtype=torch.bool) if mask is None else mask
    return replace(
        batch,
        embeds_BMD=torch.cat([embeds, anything], dim=1),
        mask_BM=torch.cat([real, real.new_zeros(texts, columns)], dim=1),
    )


def same_sums(
    ours: Mapping[tuple[int, str], MapSums], theirs: Mapping[tuple[int, str], MapSums]
) -> None:
    """To 1e-6 of the largest, as float32 allows: what is summed up may cancel."""
    assert ours.keys() == theirs.keys()
    for key, sums in theirs.items():
        for name, value in vars(sums).items():
            wanted, found = torch.as_tensor(value), torch.as_tensor(getattr(ours[key], name))
            assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), (key, name)


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
