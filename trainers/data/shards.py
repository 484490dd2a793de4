"""How an encoding lies in a store. Importing this needs no torch."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from storage.manifest import Manifest
from storage.section import Section

TENSORS = "tensors.safetensors"
CAPTIONS = "captions.json"


class EncodedMeta(Section):
    """What the manifest of a complete encoding says about it."""

    shards: PositiveInt
    """Number of shards, each published under `shard_prefix`."""
    pictures: PositiveInt
    """All pictures, the held-out ones included."""
    held_out: NonNegativeInt
    """How many of them are kept for fidelity."""
    image_tokens: PositiveInt | None = None
    """Of one picture; None where it was not noted when the shards were encoded."""
    text_tokens: NonNegativeInt | None = None
    """Of the longest caption; None likewise."""


class ShardMeta(Section):
    """What the manifest of a shard says about it; of those of the first version, nothing."""

    image_tokens: PositiveInt | None = None
    """Of one picture."""
    text_tokens: NonNegativeInt | None = None
    """Of its longest caption."""


def shard_prefixes(prefix: str, manifest: Manifest) -> list[str]:
    """All shards of the encoding under `prefix`, of which that is the manifest."""
    meta = EncodedMeta.model_validate(manifest.meta)
    return [shard_prefix(prefix, number) for number in range(meta.shards)]


def shard_prefix(prefix: str, number: int) -> str:
    """Where one shard of the encoding under `prefix` is published."""
    return f"{prefix}/shard-{number:05d}"
