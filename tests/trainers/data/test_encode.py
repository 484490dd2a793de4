"""Encoding through Ray Data, against the pipeline's own encoders run by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import JsonValue

from storage.manifest import MANIFEST, commit, published, withdraw
from storage.store import Store, open_store
from trainers.data.encode import PictureEncoders, encode, encoding_digest
from trainers.data.latents import open_latents
from trainers.data.shards import shard_prefix
from trainers.data.sources import DataConfig, DataError, list_units, read_unit
from trainers.flow import pack
from trainers.teacher import Teacher

CONFIG = DataConfig(pictures=10, held_out=2, shard=3, batch_size=2)
PREFIX = "encoded/test"


class CutOffError(Exception):
    """What stands for a kill."""


class Watch:
    """Remembers progress, and raises once `stop_at` pictures are done."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.stop_at = stop_at

    def update(self, done: int, total: int, **facts: float | str) -> None:
        assert total == CONFIG.pictures
        self.seen.append(done)
        if self.stop_at is not None and done >= self.stop_at:
            raise CutOffError


def shard_manifests(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("shard-*/manifest.json")
    }


@pytest.mark.usefixtures("ray")
def test_a_cut_off_encoding_resumes_without_encoding_a_shard_twice(
    teacher: Teacher, tmp_path: Path
):
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(CutOffError):
        encode(teacher, CONFIG, store, PREFIX, progress=Watch(stop_at=3))
    assert published(store, PREFIX) is None
    with pytest.raises(DataError, match="espalier encode"):
        open_latents(store, PREFIX, tmp_path / "cache")
    before = shard_manifests(tmp_path / "store")
    assert before

    watch = Watch()
    encode(teacher, CONFIG, store, PREFIX, workers=2, progress=watch)
    after = shard_manifests(tmp_path / "store")
    assert watch.seen[0] >= 3
    assert watch.seen[-1] == CONFIG.pictures
    assert len(after) == 4
    assert {name: after[name] for name in before} == before

    watch = Watch()
    encode(teacher, CONFIG, store, PREFIX, progress=watch)
    assert watch.seen == []

    # A shard that somebody removed, since it was damaged, is the only one encoded again.
    withdraw(store, shard_prefix(PREFIX, 1))
    watch = Watch()
    encode(teacher, CONFIG, store, PREFIX, progress=watch)
    assert watch.seen == [7, 10]
    again = shard_manifests(tmp_path / "store")
    assert again.keys() == after.keys()
    assert [Path(name).parent.name for name in after if again[name] != after[name]] == [
        "shard-00001"
    ]
    check_against_the_pipeline(teacher, store, tmp_path / "cache")
    check_what_is_said_of_tokens(teacher, store, tmp_path / "cache")


def check_what_is_said_of_tokens(teacher: Teacher, store: Store, cache: Path) -> None:
    """The manifest has what opening all shards would tell; of shards that do not say it, nothing,
    as of those encoded before they did."""
    latents = open_latents(store, PREFIX, cache)
    longest = max(int(shard.mask.sum(1).max()) for shard in latents.shards)
    rows, columns = latents.grid
    meta = said(store, PREFIX)
    assert (meta["image_tokens"], meta["text_tokens"]) == (rows * columns, longest)

    first = published(store, shard_prefix(PREFIX, 0))
    assert first is not None
    commit(store, shard_prefix(PREFIX, 0), first.files)
    store.remove(f"{PREFIX}/{MANIFEST}")
    encode(teacher, CONFIG, store, PREFIX)
    assert said(store, PREFIX) == {**meta, "image_tokens": None, "text_tokens": None}


def said(store: Store, prefix: str) -> dict[str, JsonValue]:
    manifest = published(store, prefix)
    assert manifest is not None
    return manifest.meta


def check_against_the_pipeline(teacher: Teacher, store: Store, cache: Path) -> None:
    """Every latent and embedding is what the stock pipeline's parts give for its picture."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(teacher.folder)
    latents = open_latents(store, PREFIX, cache)
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1)
    assert len(latents.training) == CONFIG.pictures - CONFIG.held_out
    at = 0
    for unit in list_units(CONFIG):
        pictures, captions = read_unit(CONFIG, unit, seed=0)
        for picture, caption in zip(pictures, captions, strict=True):
            signal = torch.tensor(picture).permute(2, 0, 1).float() / 127.5 - 1
            with torch.no_grad():
                raw = pipeline.vae.encode(signal[None, :, None]).latent_dist.mode()[:, :, 0]
                embeds, _ = pipeline.encode_prompt([caption])
            batch = latents.batch([at])
            assert latents.captions([at]) == [caption]
            torch.testing.assert_close(
                batch.clean_BNC, pack((raw - mean) / std), atol=1e-4, rtol=1e-3
            )
            torch.testing.assert_close(batch.embeds_BMD, embeds, atol=1e-4, rtol=1e-3)
            at += 1
    assert at == CONFIG.pictures


@pytest.mark.usefixtures("ray")
def test_a_bad_picture_is_named_in_one_sentence_and_the_shards_before_it_stay(
    teacher: Teacher, tmp_path: Path
):
    from PIL import Image

    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a red circle")
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    config = DataConfig(
        source="folder", path=str(tmp_path / "data"), pictures=8, held_out=1, shard=2
    )
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(DataError, match=r"7\.png: cannot be read as a picture") as caught:
        encode(teacher, config, store, PREFIX)
    assert "\n" not in str(caught.value)
    assert published(store, PREFIX) is None
    # Two shards are read at a time: when the last begins, at least two of the others are read.
    before = shard_manifests(tmp_path / "store")
    assert len(before) >= 2
    assert published(store, shard_prefix(PREFIX, 3)) is None

    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "7.png")
    encode(teacher, config, store, PREFIX)
    after = shard_manifests(tmp_path / "store")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    withdraw(store, PREFIX)
    assert published(store, shard_prefix(PREFIX, 1)) is None


def test_an_encoding_is_named_by_what_shows_in_it(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = encoding_digest(teacher, CONFIG, seed=0)
    assert name == encoding_digest(teacher, CONFIG.model_copy(update={"batch_size": 7}), seed=0)
    assert name != encoding_digest(teacher, CONFIG, seed=1)
    there = DataConfig(source="folder", path="pictures")
    monkeypatch.chdir(tmp_path)
    here = encoding_digest(teacher, there, seed=0)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert encoding_digest(teacher, there, seed=0) != here  # another folder by the same words
    same = there.model_copy(update={"path": str(tmp_path / "pictures")})
    assert encoding_digest(teacher, same, seed=0) == here
    assert name != encoding_digest(teacher, CONFIG.model_copy(update={"resolution": 32}), seed=0)


def test_large_pictures_pass_the_autoencoder_a_few_at_a_time(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
):
    encoders = PictureEncoders(teacher, torch.float32, "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    captions = [f"picture {i}" for i in range(5)]
    whole = encoders.encode(pictures, captions, batch_size=5)

    sizes = []
    apart = encoders.vae.encode
    monkeypatch.setattr(
        encoders.vae, "encode", lambda x, **named: (sizes.append(len(x)), apart(x, **named))[1]
    )
    monkeypatch.setattr("trainers.data.encode.PIXELS_AT_ONCE", 2 * 64 * 64)
    parts = encoders.encode(pictures, captions, batch_size=5)
    assert sizes == [2, 2, 1]
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
