"""Runs the teacher's own autoencoder and text encoder over a data source, shard by shard.

Ray Data streams units: tasks read and crop pictures, a pool of actors encodes them and publishes
each shard as soon as it is whole. A later run encodes only the shards that are not there yet; the
manifest over all of them comes last.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.digest import digest_json
from storage.errors import EspalierError
from storage.manifest import Manifest, all_published, commit, publish_once, published
from storage.store import Store, StoreOptions, open_store
from storage.tensors import save_tensors
from trainers.data.shards import (
    CAPTIONS,
    TENSORS,
    EncodedMeta,
    ShardMeta,
    shard_prefix,
    shard_prefixes,
)
from trainers.data.sources import DataConfig, DataError, Unit, list_units, read_unit
from trainers.placement import Accelerator, Share, share_of
from trainers.progress import Progress, silent
from trainers.teacher import Teacher

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


def encoding_digest(teacher: Teacher, config: DataConfig, seed: int) -> str:
    """Names what `encode` makes: the encoders and all of the configuration that shows in it."""
    shown = config.model_dump(mode="json", exclude={"batch_size"})
    if config.path is not None and "://" not in config.path:
        # The same words mean another folder elsewhere, and the storage may be shared.
        shown["path"] = str(Path(config.path).expanduser().resolve())
    return digest_json({"encoder": teacher.encoder_digest, "data": shown, "seed": seed})


def encode(
    teacher: Teacher,
    config: DataConfig,
    store: Store,
    prefix: str,
    *,
    options: StoreOptions | None = None,
    workers: int = 1,
    accelerator: Accelerator = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Encode the source under `prefix`, unless that is done; `trainers.data.latents` reads it.

    `workers` processes encode, each with the store opened by its URL and `options`. Raises
    DataError naming the first picture or caption that cannot be used; the shards before it stay.
    Of an encoding that has lost shards, only those are encoded again.
    """
    done = published(store, prefix)
    if done is not None and all_published(store, shard_prefixes(prefix, done)):
        return done
    progress = progress or silent()
    units = list_units(config, options)
    total = sum(len(unit.items) for unit in units)
    missing = [
        unit for unit in units if published(store, shard_prefix(prefix, unit.number)) is None
    ]
    finished = total - sum(len(unit.items) for unit in missing)
    progress.update(finished, total)
    if missing:
        arguments = {
            "teacher": teacher, "config": config, "url": store.url, "options": options,
            "prefix": prefix,
        }  # fmt: skip
        # Closed at once whatever happens: actors of an abandoned stream would keep their CPUs.
        with closing(_stream(missing, config, seed, arguments, workers, accelerator)) as shards:
            for count, error in shards:
                if error:
                    raise DataError(error)
                finished += count
                progress.update(finished, total)
    tokens = _tokens(store, [shard_prefix(prefix, unit.number) for unit in units])
    meta = EncodedMeta(shards=len(units), pictures=total, held_out=config.held_out, **tokens)
    # In one step: another sweep may be reading by it.
    return commit(store, prefix, {}, meta.model_dump(mode="json"))


def _tokens(store: Store, prefixes: Sequence[str]) -> dict[str, int]:
    """What an encoding of these shards says of its tokens, or nothing where a shard does not."""
    with ThreadPoolExecutor(16) as pool:
        manifests = list(pool.map(partial(published, store), prefixes))
    metas = [ShardMeta.model_validate(manifest.meta) for manifest in manifests if manifest]
    images = [meta.image_tokens for meta in metas if meta.image_tokens is not None]
    texts = [meta.text_tokens for meta in metas if meta.text_tokens is not None]
    if min(len(images), len(texts)) < len(prefixes):
        return {}
    return {"image_tokens": images[0], "text_tokens": max(texts)}


def _stream(
    units: Sequence[Unit],
    config: DataConfig,
    seed: int,
    arguments: dict[str, Any],
    workers: int,
    accelerator: Accelerator,
) -> Generator[tuple[int, str], None, None]:
    """Yields the number of pictures in each shard as it is published, or what is wrong with it."""
    import logging

    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    share = share_of(workers, accelerator)
    actors = min(workers, len(units))
    # A GPU encodes faster than one process reads; a processor does not, and each has to start.
    readers = 2 * actors if accelerator == "gpu" else actors
    rows = (
        ray.data.from_items(
            [{"number": unit.number, "items": json.dumps(unit.items)} for unit in units],
            override_num_blocks=len(units),
        )
        .map(
            _read_row,
            fn_kwargs={"config": config, "seed": seed, "options": arguments["options"]},
            num_cpus=0.25,
            compute=ray.data.TaskPoolStrategy(size=min(readers, len(units))),
        )
        .map_batches(
            Encoder,
            batch_size=1,
            fn_constructor_kwargs={**arguments, "share": share},
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        )
    )
    for row in rows.iter_rows():
        yield int(row["count"]), row["error"]


def _read_row(
    row: dict[str, Any], config: DataConfig, seed: int, options: StoreOptions | None
) -> dict[str, Any]:
    """A unit's pictures. Errors travel as a column: raised here, Ray would log and wrap them."""
    unit = Unit(row["number"], tuple(_items(row["items"])))
    read = {"number": unit.number, "pictures": b"", "captions": "[]", "error": ""}
    try:
        pictures, captions = read_unit(config, unit, seed, options)
    except EspalierError as error:
        return {**read, "error": str(error)}
    return {**read, "pictures": pictures.tobytes(), "captions": json.dumps(captions)}


def _items(text: str) -> list[Any]:
    return [tuple(item) if isinstance(item, list) else item for item in json.loads(text)]


class Encoder:
    """An actor of Ray Data: the encoders, loaded once, and a store of its own."""

    def __init__(
        self,
        teacher: Teacher,
        config: DataConfig,
        url: str,
        options: StoreOptions | None,
        prefix: str,
        share: Share,
    ) -> None:
        import torch

        share.prepare()
        dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
        self.config, self.prefix = config, prefix
        self.store = open_store(url, options, patient=True)
        self.encoders = PictureEncoders(teacher, dtype, share.device)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """One unit, read: encode it and publish its shard."""
        import numpy as np

        (number,), (content,) = batch["number"], batch["pictures"]
        (captions_json,), (error,) = batch["captions"], batch["error"]
        captions = json.loads(captions_json)
        if not error:
            side = self.config.resolution
            pictures = np.frombuffer(content, np.uint8).reshape(-1, side, side, 3)
            tensors = self.encoders.encode(pictures, captions, self.config.batch_size)
            _, _, rows, columns = tensors["latents"].shape
            meta = ShardMeta(
                image_tokens=(rows // 2) * (columns // 2),
                text_tokens=int(tensors["mask"].sum(1).max()),
            )
            publish_once(
                self.store,
                shard_prefix(self.prefix, int(number)),
                {
                    TENSORS: save_tensors(tensors),
                    CAPTIONS: json.dumps(captions, ensure_ascii=False).encode(),
                },
                meta.model_dump(mode="json"),
            )
        return {"count": [len(captions)], "error": [str(error)]}


PIXELS_AT_ONCE = 2**20
"""Of pictures in the autoencoder together: Qwen-Image's takes 5 GiB for them in float32."""


class PictureEncoders:
    """A teacher's autoencoder and text encoder, ready for single pictures. Plain torch."""

    def __init__(self, teacher: Teacher, dtype: torch.dtype, device: str) -> None:
        from trainers.data.single_frame import for_single_frames

        self.family = teacher.family
        self.vae = teacher.vae(dtype, device)
        self.text = teacher.text(dtype, device)
        self.dtype, self.device = dtype, device
        for_single_frames(self.vae)

    def encode(
        self, pictures: NDArray[np.uint8], captions: Sequence[str], batch_size: int
    ) -> dict[str, Tensor]:
        """The tensors of a shard: normalised latents, padded embeddings, their mask, and the
        pooled embeddings of a family that reads such."""
        import torch

        latents, embeds, masks, pooled = [], [], [], []
        with torch.no_grad():
            for start in range(0, len(captions), batch_size):
                stop = start + batch_size
                latents.append(self._latents(torch.tensor(pictures[start:stop])))
                texts = self.family.encode_texts(self.text, captions[start:stop])
                embeds.append(texts.embeds_BMD.cpu())
                whole = torch.ones(texts.embeds_BMD.shape[:2], dtype=torch.bool)
                masks.append(whole if texts.mask_BM is None else texts.mask_BM.cpu())
                if texts.pooled_BP is not None:
                    pooled.append(texts.pooled_BP.cpu())
        longest = max(mask.shape[1] for mask in masks)
        tensors = {
            "latents": torch.cat(latents),
            "embeds": torch.cat([_padded(e, longest) for e in embeds]),
            "mask": torch.cat([_padded(m, longest) for m in masks]),
        }
        return {**tensors, "pooled": torch.cat(pooled)} if pooled else tensors

    def _latents(self, pictures: Tensor) -> Tensor:
        """[n, channels, rows, columns], normalised."""
        import torch

        height, width = pictures.shape[1:3]
        parts = []
        for some in pictures.split(max(1, PIXELS_AT_ONCE // (height * width))):
            signal = some.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
            latents = self.family.encode_pictures(self.vae, signal.to(self.dtype))
            parts.append(latents.to(self.dtype).cpu())
        return torch.cat(parts)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[n, M, ...] with zeros up to M = length."""
    padded = tensor.new_zeros(len(tensor), length, *tensor.shape[2:])
    padded[:, : tensor.shape[1]] = tensor
    return padded
