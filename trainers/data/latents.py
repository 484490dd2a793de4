"""Encoded pictures as training reads them: batches whose place in the run is one number.

Which pictures, times and noise step s sees depends on the seed and on s alone, so a run continues
exactly by knowing its step. Shapes: B batch, N image tokens, C latent channels of a packed token,
M text tokens, D embedding width, P width of pooled embeddings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from storage.manifest import in_parallel, published
from storage.store import Store
from storage.tensors import load_tensors
from trainers.cache import local_copy
from trainers.data.shards import CAPTIONS, TENSORS, EncodedMeta, shard_prefix
from trainers.data.sources import DataError
from trainers.flow import noised, pack, sample_timesteps
from trainers.students.families.base import Inputs

__all__ = [
    "CAPTIONS",
    "TENSORS",
    "EncodedMeta",
    "LatentBatch",
    "Latents",
    "Shard",
    "generator_at",
    "make_inputs",
    "open_latents",
    "shard_prefix",
    "shares",
    "training_inputs",
]


@dataclass(frozen=True)
class LatentBatch:
    """Encoded pictures with their captions' embeddings, and where in the run they stand."""

    clean_BNC: Tensor
    """Packed, normalised latents."""
    embeds_BMD: Tensor
    """Padded at the end to the longest caption of this batch."""
    mask_BM: Tensor | None
    """bool, true for real text tokens; None when all are."""
    grid: tuple[int, int]
    """Rows and columns of image tokens."""
    step: int = 0
    """The optimizer step this batch is for."""
    first: int = 0
    """Number of its first picture in the step's whole batch."""
    whole: int | None = None
    """Pictures of the step's whole batch; None when this is it."""
    pooled_BP: Tensor | None = None
    """One embedding of each whole caption, where the family reads such."""

    def __len__(self) -> int:
        return len(self.clean_BNC)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LatentBatch:
        """The same batch on `device`; `dtype` converts latents and embeddings."""
        mask_BM, pooled_BP = self.mask_BM, self.pooled_BP
        return replace(
            self,
            clean_BNC=self.clean_BNC.to(device, dtype, non_blocking=True),
            embeds_BMD=self.embeds_BMD.to(device, dtype, non_blocking=True),
            mask_BM=None if mask_BM is None else mask_BM.to(device, non_blocking=True),
            pooled_BP=None if pooled_BP is None else pooled_BP.to(device, dtype, non_blocking=True),
        )


def make_inputs(batch: LatentBatch, t_B: Tensor, noise_BNC: Tensor) -> Inputs:
    """The transformer's inputs for a batch at times `t_B` with the given noise."""
    t_B = t_B.to(batch.clean_BNC.device, batch.clean_BNC.dtype)
    return Inputs(
        noisy_BNC=noised(batch.clean_BNC, noise_BNC, t_B),
        timestep_B=t_B,
        embeds_BMD=batch.embeds_BMD,
        mask_BM=batch.mask_BM,
        grid=batch.grid,
        pooled_BP=batch.pooled_BP,
    )


def training_inputs(batch: LatentBatch, seed: int, shift: float = 1.0) -> tuple[Inputs, Tensor]:
    """Inputs at random times, and the noise in them [B, N, C]; fixed by seed and `batch.step`.

    Drawn on the CPU for the step's whole batch, so that neither the device nor the number of
    ranks changes what a picture is given.
    """
    count = batch.whole or len(batch)
    generator = generator_at(seed, batch.step, "noise")
    t = sample_timesteps(count, generator, shift)
    noise = torch.randn(count, *batch.clean_BNC.shape[1:], generator=generator)
    mine = slice(batch.first, batch.first + len(batch))
    noise_BNC = noise[mine].to(batch.clean_BNC)
    return make_inputs(batch, t[mine], noise_BNC), noise_BNC


def shares(batch_size: int, world: int) -> list[tuple[int, int]]:
    """The pictures of a batch that each rank gets: from one, up to another."""
    edges = [rank * batch_size // world for rank in range(world + 1)]
    return list(itertools.pairwise(edges))


def generator_at(seed: int, position: int, purpose: str) -> Generator:
    """A CPU generator fixed by seed, position and purpose; no two share a stream."""
    mixed = hashlib.sha256(f"{seed}/{position}/{purpose}".encode()).digest()[:8]
    return Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)


@dataclass(frozen=True)
class Shard:
    """A run of encoded pictures."""

    latents: Tensor
    """[n, channels, rows, columns], normalised, not yet packed."""
    embeds: Tensor
    """[n, M, D], padded at the end."""
    mask: Tensor
    """[n, M] bool."""
    captions: tuple[str, ...]
    pooled: Tensor | None = None
    """[n, P], where the family reads such."""


class Latents:
    """All encoded pictures of one encoding: `held_out` of them for fidelity, the others to train.

    Which are held out is drawn once for all, since sources are often sorted. Shards come from
    memory-mapped files, so that only the rows a batch asks for are read.
    """

    def __init__(self, shards: Sequence[Shard], held_out: int) -> None:
        self.shards = tuple(shards)
        self._rows = [(s, i) for s, shard in enumerate(shards) for i in range(len(shard.latents))]
        if not 0 <= held_out < len(self._rows):
            raise DataError(
                f"data.held_out: {held_out} pictures are to be held out of {len(self._rows)}; "
                "at least one must be left to train on"
            )
        order = torch.randperm(len(self._rows), generator=generator_at(0, 0, "held out")).tolist()
        self.held_out: Sequence[int] = sorted(order[:held_out])
        """Indices of the pictures that no training sees."""
        self.training: Sequence[int] = sorted(order[held_out:])
        """Indices of the pictures to train on."""
        _, _, rows, columns = self.shards[0].latents.shape
        self.grid = (rows // 2, columns // 2)

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The captions of some pictures."""
        return [self.shards[s].captions[i] for s, i in map(self._rows.__getitem__, indices)]

    def batch(
        self, indices: Sequence[int], step: int = 0, first: int = 0, whole: int | None = None
    ) -> LatentBatch:
        """Some pictures by index; text is padded to the longest caption among them."""
        rows = [self._rows[i] for i in indices]
        latents = torch.stack([self.shards[s].latents[i] for s, i in rows])
        lengths = [int(self.shards[s].mask[i].sum()) for s, i in rows]
        longest = max(lengths)
        example = self.shards[0].embeds
        embeds = example.new_zeros(len(rows), longest, example.shape[-1])
        for row, ((s, i), length) in enumerate(zip(rows, lengths, strict=True)):
            embeds[row, :length] = self.shards[s].embeds[i, :length]
        mask = None
        if min(lengths) < longest:
            mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        pools = [(self.shards[s].pooled, i) for s, i in rows]
        pooled = [pool[i] for pool, i in pools if pool is not None]
        return LatentBatch(
            pack(latents), embeds, mask, self.grid, step, first, whole,
            torch.stack(pooled) if pooled else None,
        )  # fmt: skip

    def batches(
        self,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[LatentBatch]:
        """Training batches of these numbers, which are the steps they are for; None is for all from
        0 on, without end.

        Epochs are shuffled apart and follow one another without a seam. `batch_size` is the whole
        step's; rank `rank` of `world` gets its slice, of which none is larger than another by more
        than one picture. Raises DataError when there are fewer pictures than ranks.
        """
        if batch_size < world:
            raise DataError(
                f"batch_size: {batch_size} pictures cannot be shared by {world} workers; make it "
                f"at least {world}"
            )
        first, last = shares(batch_size, world)[rank]
        orders: dict[int, list[int]] = {}
        for step in itertools.count() if numbers is None else numbers:
            places = range(step * batch_size + first, step * batch_size + last)
            count = len(self.training)
            epochs = {place // count for place in places}
            orders = {
                epoch: orders[epoch] if epoch in orders else self._order(seed, epoch)
                for epoch in epochs
            }
            indices = [orders[place // count][place % count] for place in places]
            yield self.batch(indices, step, first, batch_size)

    def _order(self, seed: int, epoch: int) -> list[int]:
        places = torch.randperm(len(self.training), generator=generator_at(seed, epoch, "order"))
        return [self.training[place] for place in places.tolist()]


def open_latents(
    store: Store,
    prefix: str,
    cache: Path | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Latents:
    """The encoding under `prefix`, brought to this machine and verified.

    `cache` is as in `trainers.cache.local_copy`; `alive` is called with every shard. DataError when
    the encoding is not complete.
    """
    manifest = published(store, prefix)
    if manifest is None:
        raise DataError(
            f"{store.url}/{prefix}: no complete encoding is there; run `espalier encode` first"
        )
    meta = EncodedMeta.model_validate(manifest.meta)

    def opened(number: int) -> Shard:
        place = shard_prefix(prefix, number)
        folder = local_copy(store, place, cache=cache)
        alive()
        tensors = load_tensors(folder / TENSORS, f"{store.url}/{place}/{TENSORS}")
        captions = tuple(json.loads((folder / CAPTIONS).read_text(encoding="utf-8")))
        latents, embeds, mask = (tensors[name] for name in ("latents", "embeds", "mask"))
        return Shard(latents, embeds, mask, captions, tensors.get("pooled"))

    return Latents(in_parallel(opened, range(meta.shards)), meta.held_out)
