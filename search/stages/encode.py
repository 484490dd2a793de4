"""Stage 1: pictures and captions to latents and text embeddings."""

from __future__ import annotations

from search.stages.stage import Outcome, Stage
from search.sweep import Sweep
from storage.manifest import published
from trainers.data.encode import encode
from trainers.data.latents import EncodedMeta
from trainers.data.shards import shard_prefixes
from trainers.data.sources import list_units
from trainers.progress import Progress


def run(sweep: Sweep, progress: Progress) -> Outcome:
    config = sweep.config
    manifest = encode(
        sweep.teacher,
        config.data,
        sweep.store,
        sweep.encoded_prefix,
        options=config.store,
        workers=config.workers,
        accelerator=config.accelerator,
        seed=config.seed,
        progress=progress,
    )
    meta = EncodedMeta.model_validate(manifest.meta)
    return Outcome(f"{meta.pictures} pictures, {meta.held_out} of them held out", {})


def shards(sweep: Sweep) -> list[str]:
    """Where the shards of this sweep's encoding live, when it is complete."""
    manifest = published(sweep.store, sweep.encoded_prefix)
    return [] if manifest is None else shard_prefixes(sweep.encoded_prefix, manifest)


ENCODE = Stage(
    name="encode",
    digest=lambda sweep: sweep.encoded_digest,
    shared=lambda sweep: sweep.encoded_prefix,
    parts=shards,
    run=run,
    check=lambda sweep: list_units(sweep.config.data, sweep.config.store),
)
